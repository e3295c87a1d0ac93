// moegraft inspect --plan: the traffic that is reckoned is what real processes count, and step times follow from what
// was measured.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/model/weights.h"
#include "moegraft/planning/traffic.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

using io::Json;
using planning::Purpose;
using testing::Process;
using testing::run_moegraft;
using Keys = std::vector<std::string>;

class Plan : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (testing::moegraft_binary().empty()) return;
    folder_ = new testing::TemporaryFolder;
    testing::TinyOptions options;
    options.layers = 4;
    base_ = new std::string(testing::make_tiny_world(folder_->path(), options).base.string());
  }
  static void TearDownTestSuite() {
    delete base_;
    delete folder_;
    base_ = nullptr, folder_ = nullptr;
  }
  void SetUp() override {
    if (!base_) GTEST_SKIP() << "the moegraft binary is not built";
  }
  static Json launched(int processes, const Keys& more) {
    Keys argv{testing::moegraft_binary().string(), "launch", "--nproc", std::to_string(processes), "--", "bench"};
    argv.insert(argv.end(), more.begin(), more.end());
    argv.push_back("--json");
    const auto r = Process(argv, {"OMP_NUM_THREADS=1"}).wait();
    EXPECT_EQ(r.code, 0) << r.err;
    return r.code == 0 ? Json::parse(r.out) : Json::object();
  }
  // Rank 3, so that no gradient ends where a bucket's next one begins.
  static Json step(int processes, const Keys& more) {
    Keys args{
        "step", *base_,     "--dtype", "float32",          "--rank",  "3", "--sites", "gate,down,q", "--image-share",
        "0.5",  "--codes",  "6",       "--whole-backward", "--batch", "4", "--seq",   "20",          "--steps",
        "2",    "--matmul", "64",      "--bucket-mib",     "0.01"};
    args.insert(args.end(), more.begin(), more.end());
    return launched(processes, args);
  }
  static planning::MemoryRequest request(int64_t processes, int64_t expert) {
    planning::MemoryRequest r;
    r.spec = model::read_spec(*base_);
    r.tokens = 80 / processes;
    r.expert_size = expert, r.data_size = processes / expert;
    r.new_rows = 8;  // 6 codes, begin, end
    r.adapters = {{3, {model::Site::gate, model::Site::down, model::Site::q}, {}}};
    return r;
  }
  std::string write(const std::string& name, const Json& j) const {
    const auto file = folder_->path() / name;
    io::write_file_atomic(file, j.dump());
    return file.string();
  }
  static inline testing::TemporaryFolder* folder_ = nullptr;
  static inline std::string* base_ = nullptr;
};

TEST_F(Plan, TrafficIsWhatTheProcessesCount) {
  struct Case {
    int processes;
    int64_t expert;
    bool base, optimizer;
    int64_t recompute;
    bool even;  // with as many processes as experts each token goes to exactly top-k of them
  };
  for (const Case& c : {Case{2, 1, false, false, 0, true}, Case{2, 1, true, true, 0, true},
                        Case{4, 4, false, false, 1, true}, Case{4, 2, true, true, 0, false}}) {
    SCOPED_TRACE(std::to_string(c.processes) + " processes, experts over " + std::to_string(c.expert));
    Keys options{"--expert-parallel", std::to_string(c.expert), "--recompute", std::to_string(c.recompute)};
    if (c.base) options.push_back("--shard-base");
    if (c.optimizer) options.push_back("--shard-optimizer");
    const Json j = step(c.processes, options);
    if (j.empty()) continue;
    EXPECT_EQ(j["processes"], c.processes);
    EXPECT_EQ(j["expert_parallel"], c.expert);
    auto r = request(c.processes, c.expert);
    r.shard_base = c.base, r.shard_optimizer = c.optimizer;
    const auto traffic = planning::count_traffic(r, 1, c.recompute, 0.01 * (1 << 20));
    const auto bytes = [&](const char* kind) {
      return j["traffic_of_rank_0"].contains(kind) ? j["traffic_of_rank_0"][kind]["bytes"].get<double>() : 0.0;
    };
    double agreement_of_experts = 0, agreement_elsewhere = 0, buckets = 0, gathers = 0;
    for (const auto& m : traffic) {
      if (m.purpose == Purpose::agreement)
        (m.group == planning::Group::expert ? agreement_of_experts : agreement_elsewhere) += m.calls * m.bytes_each;
      if (m.purpose == Purpose::gradients) buckets += m.calls;
      if (m.purpose == Purpose::base) gathers += m.calls;
    }
    EXPECT_GT(bytes("gradients"), 0);
    EXPECT_EQ(bytes("gradients"), total_bytes(traffic, Purpose::gradients));
    EXPECT_EQ(j["traffic_of_rank_0"]["gradients"]["calls"], buckets);
    EXPECT_EQ(bytes("base"), total_bytes(traffic, Purpose::base));
    EXPECT_EQ(bytes("base") > 0, c.base);
    if (c.base) EXPECT_EQ(j["traffic_of_rank_0"]["base"]["calls"], gathers);
    EXPECT_EQ(bytes("updates"), total_bytes(traffic, Purpose::updates) + agreement_elsewhere);
    // What one process gets depends on the routing; over all it evens out, exactly where every token goes to as many
    // processes.
    const double experts = total_bytes(traffic, Purpose::experts) + agreement_of_experts;
    if (c.expert > 1) EXPECT_NEAR(bytes("experts") / experts, 1.0, 0.3);
    double all = 0;
    for (const auto& m : traffic) all += double(c.processes) * m.calls * m.bytes_each;
    EXPECT_NEAR(j["bytes_per_step"].get<double>() / all, 1.0, c.even ? 1e-12 : 0.15);
    for (const char* key : {"busy_share", "wait_share"}) EXPECT_TRUE(j[key] >= 0.0 && j[key] <= 1.0) << key;
    EXPECT_EQ(j["peak_mib_by_rank"].size(), size_t(c.processes));
  }
}

TEST_F(Plan, EveryLayoutHasTheSameFirstLoss) {
  const Json one = step(1, {});
  for (const Keys& layout : {Keys{}, Keys{"--expert-parallel", "2"}, Keys{"--shard-base", "--shard-optimizer"}}) {
    const Json two = step(2, layout);
    EXPECT_NEAR(two["loss"][0].get<double>(), one["loss"][0].get<double>(), 1e-5);
    EXPECT_EQ(two["trained_parameters"], one["trained_parameters"]);
    EXPECT_DOUBLE_EQ(two["flops_per_token"].get<double>(), one["flops_per_token"].get<double>());
    EXPECT_EQ(two["tokens"], 80);
  }
}

TEST_F(Plan, SavesAreMeasuredInBothWays) {
  for (const int processes : {1, 2}) {
    const auto folder = folder_->path() / ("saves-" + std::to_string(processes));
    const Json j = step(processes, {"--save", folder.string()})["checkpoint"];
    for (const char* way : {"async", "at_once"})
      for (const char* key : {"stall_s", "write_s", "stall_share_every_100"})
        EXPECT_GT(j[way][key].get<double>(), 0) << way << " " << key;
    EXPECT_GT(j["bytes_of_rank_0"].get<int64_t>(), 0);
    EXPECT_TRUE(std::filesystem::exists(folder / "async" / "step-00000003" / "manifest.json"));
  }
}

TEST(MeanVisits, CountsWhatChanceWouldChoose) {
  EXPECT_DOUBLE_EQ(planning::mean_visits(4, 2, 1), 1);
  EXPECT_DOUBLE_EQ(planning::mean_visits(4, 2, 4), 2);
  EXPECT_DOUBLE_EQ(planning::mean_visits(4, 2, 2), 2 * (1 - 1.0 / 6));  // of 6 pairs one lies wholly on the other side
  EXPECT_DOUBLE_EQ(planning::mean_visits(4, 3, 2), 2);
}

TEST_F(Plan, CollectivesReportBandwidths) {
  const Json j = launched(2, {"collectives", "--sizes", "4K,64K", "--rounds", "2"});
  ASSERT_EQ(j["collectives"].size(), 10u);
  EXPECT_EQ(j["processes"], 2);
  EXPECT_EQ(j["backend"], "gloo");
  for (const auto& c : j["collectives"]) {
    EXPECT_GE(c["ms"], c["best_ms"]);
    const double bus = c["bus_gb_per_s"].get<double>() / c["algorithm_gb_per_s"].get<double>(),
                 expected = c["op"] == "all_reduce" || c["op"] == "broadcast" ? 1.0 : 0.5;
    EXPECT_NEAR(bus, expected, 1e-9) << c["op"];
  }
  const auto alone = run_moegraft({"bench", "collectives", "--sizes", "4K", "--rounds", "1", "--json"});
  EXPECT_EQ(alone.code, 0) << alone.err;
}

// One second for 80 tokens; 1 ms for any exchange of 1 KiB or less and 1 ms more for each KiB.
class PlanOfTimes : public Plan {
 protected:
  void SetUp() override {
    Plan::SetUp();
    if (IsSkipped()) return;
    spec_ = model::read_spec(*base_);
    step_ = write("step.json", {{"bench", "step"},
                                {"processes", 1},
                                {"tokens", 80},
                                {"median_step_s", 1.0},
                                {"dtype", "float32"},
                                {"rank", 3},
                                {"gate", "modality"},
                                {"new_rows", 8},
                                {"sites", {"gate", "down", "q"}},
                                {"active_parameters", spec_.num_active_parameters()},
                                {"threads", 1},
                                {"cores", 64},
                                {"device", "cpu"},
                                {"recompute_layers", 0},
                                {"flops", {{"forward", 2.0}, {"activation_gradient", 2.0}, {"lora", 0.0}}}});
    Json all = Json::array();
    for (const char* op : {"all_reduce", "all_gather", "all_to_all", "broadcast"})
      for (const int kib : {1, 2, 1 << 20}) all.push_back({{"op", op}, {"bytes", 1024.0 * kib}, {"ms", double(kib)}});
    collectives_ =
        write("collectives.json", {{"bench", "collectives"}, {"processes", 2}, {"nodes", 1}, {"collectives", all}});
  }
  Json plan(const std::string& layout) const {
    const auto r =
        run_moegraft({"inspect", *base_, "--plan", layout, "--measured", step_, "--measured", collectives_, "--json"});
    EXPECT_EQ(r.code, 0) << r.err;
    return r.code == 0 ? Json::parse(r.out)["cluster"] : Json::object();
  }
  model::DecoderSpec spec_;
  std::string step_, collectives_;
};

TEST_F(PlanOfTimes, AreThoseOfTheMeasuredGroup) {
  const Json one = plan("gpus=1");
  EXPECT_DOUBLE_EQ(one["step_seconds"].get<double>(), 1.0);
  EXPECT_EQ(one["communication_share"], 0.0);
  const Json two = plan("gpus=2");
  EXPECT_DOUBLE_EQ(two["compute_seconds"].get<double>(), 0.5);
  double ms = 0;
  for (const auto& m : planning::count_traffic(request(2, 1), 1, 0, 25 * double(1 << 20)))
    ms += m.calls * std::max(1.0, m.bytes_each / 1024);
  EXPECT_NEAR(two["seconds_under_way"]["gradients"].get<double>(), ms / 1e3, 1e-9);
  EXPECT_NEAR(two["step_seconds"].get<double>(), 0.5 + ms / 1e3, 1e-9);
  EXPECT_NEAR(two["tokens_per_s"].get<double>(), 80 / (0.5 + ms / 1e3), 1e-6);
  // A forward pass more, for the layers that are computed twice.
  EXPECT_DOUBLE_EQ(plan("gpus=2,shard_base=true")["compute_seconds"].get<double>(), 0.75);
}

TEST_F(PlanOfTimes, GrowWithTheRing) {
  // 4 members: 6 rounds instead of 2, and 3/2 of the message instead of 1 on each link.
  double ms = 0;
  for (const auto& m : planning::count_traffic(request(4, 1), 1, 0, 25 * double(1 << 20)))
    ms += m.calls * (3 + std::max(0.0, 1.5 * m.bytes_each / 1024 - 1));
  const Json four = plan("nodes=2,gpus=2");
  EXPECT_NEAR(four["seconds_under_way"]["gradients"].get<double>(), ms / 1e3, 1e-9);
  EXPECT_TRUE(four.contains("note")) << "nothing was measured between machines";
  EXPECT_FALSE(plan("gpus=4").contains("note"));
}

TEST_F(PlanOfTimes, WrongUsageIsNamed) {
  const auto fails = [&](const Keys& args, int code, const std::string& text) {
    const auto r = run_moegraft(args);
    EXPECT_EQ(r.code, code);
    EXPECT_NE(r.err.find(text), std::string::npos) << r.err;
  };
  fails({"inspect", *base_, "--plan", "gpus=2"}, 2, "--measured");
  fails({"inspect", *base_, "--plan", "cards=2", "--measured", step_}, 2, "'cards' is none of");
  fails({"inspect", *base_, "--plan", "gpus=3,expert=3", "--measured", step_}, 2, "must divide the model's 4 experts");
  fails({"inspect", *base_, "--plan", "gpus=4,expert=3", "--measured", step_}, 2, "must divide the 4 processes");
  fails({"inspect", *base_, "--plan", "gpus=2", "--measured", collectives_}, 1, "step time of one process is missing");
  fails({"inspect", *base_, "--plan", "gpus=2", "--measured", step_}, 1, "exchanges between processes are missing");
  fails({"inspect", *base_, "--plan", "gpus=2", "--measured", *base_ + "/config.json"}, 1, "is not the output of");
  fails({"bench", "collectives", "--sizes", "4Q"}, 2, "--sizes");
}

}  // namespace
}  // namespace moegraft
