// Runs of several processes through the binary, as users start them: the same losses under every layout, resumes across
// layouts, kills, hangs, bad input.
#include <gtest/gtest.h>

#include <csignal>
#include <fstream>
#include <map>
#include <thread>

#include "libtorch.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/distributed/launch.h"
#include "moegraft/io/files.h"
#include "moegraft/routing/stats.h"
#include "moegraft/run/signals.h"
#include "support/metrics.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using moegraft::testing::make_tiny_world;
using moegraft::testing::Process;
using moegraft::testing::ProcessResult;
using moegraft::testing::TemporaryFolder;
using moegraft::testing::TinyWorld;
using Keys = std::vector<std::string>;

std::map<int64_t, run::TrainingLine> training_lines(const fs::path& run) {
  std::map<int64_t, run::TrainingLine> out;
  for (const auto& line : moegraft::testing::metrics_of(run).training) out[line.step] = line;
  return out;
}

checkpoint::Checkpoint latest(const fs::path& run) {
  return checkpoint::load(*checkpoint::find_latest(run / "checkpoints"));
}

// Every byte that training made, whatever wrote it.
void expect_same_bits(const fs::path& a, const fs::path& b) {
  const auto x = latest(a), y = latest(b);
  EXPECT_EQ(x.step, y.step);
  for (const auto& [mine, others] : {std::pair(&x.parameters, &y.parameters), std::pair(&x.optimizer, &y.optimizer)}) {
    EXPECT_EQ(mine->size(), others->size());
    for (const auto& [name, tensor] : *mine) EXPECT_TRUE(at::equal(tensor, others->at(name))) << name;
  }
  const auto la = training_lines(a), lb = training_lines(b);
  ASSERT_EQ(la.size(), lb.size());
  for (const auto& [step, line] : la)
    EXPECT_TRUE(line.loss == lb.at(step).loss && line.grad_norm == lb.at(step).grad_norm) << "step " << step;
}

// The same training but for the order of sums.
void expect_same_training(const fs::path& a, const fs::path& b, const std::string& what) {
  const auto la = training_lines(a), lb = training_lines(b);
  ASSERT_EQ(la.size(), lb.size()) << what;
  for (const auto& [step, line] : la) {
    EXPECT_NEAR(line.loss, lb.at(step).loss, 1e-5 * std::abs(line.loss)) << what << " step " << step;
    EXPECT_NEAR(line.grad_norm, lb.at(step).grad_norm, 1e-4 * line.grad_norm) << what << " step " << step;
  }
  EXPECT_NEAR(la.begin()->second.grad_norm, lb.begin()->second.grad_norm, 1e-5 * la.begin()->second.grad_norm) << what;
  const auto x = latest(a), y = latest(b);
  for (const auto& [name, tensor] : x.parameters) {
    ASSERT_EQ(tensor.sizes(), y.parameters.at(name).sizes()) << what << " " << name;
    // AdamW divides by a gradient's own size: where that is all rounding, so is the update.
    const double most = (tensor - y.parameters.at(name)).abs().max().item<double>(),
                 mean = (tensor - y.parameters.at(name)).abs().mean().item<double>();
    EXPECT_LT(mean, 1e-5) << what << " " << name;
    EXPECT_LT(most, 2e-2) << what << " " << name;
  }
}

class Together : public ::testing::Test {
 protected:
  void SetUp() override {
    if (moegraft::testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
    world_ = make_tiny_world(folder_.path());
  }
  fs::path run_path(const std::string& name) const { return world_.dir / name; }

  // train with these keys over the tiny world's config.
  Keys arguments(const std::string& name, const std::string& resume, const Keys& keys) const {
    Keys argv{"train", "-c", world_.yaml.string(), "--resume", resume};
    Keys all{"run.dir=" + run_path(name).string(),
             "train.steps=8",
             "train.warmup=2",
             "checkpoint.every=4",
             "checkpoint.keep=100",
             "train.sample_prompts=[]"};
    all.insert(all.end(), keys.begin(), keys.end());
    for (const auto& key : all) argv.insert(argv.end(), {"--set", key});
    return argv;
  }
  Keys launched(int processes, const Keys& arguments, const Keys& options = {}) const {
    const std::string binary = moegraft::testing::moegraft_binary().string();
    Keys argv{binary};
    if (processes > 1) {
      argv.insert(argv.end(), {"launch", "--nproc", std::to_string(processes)});
      argv.insert(argv.end(), options.begin(), options.end());
      argv.push_back("--");
    }
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    return argv;
  }
  void train(const std::string& name, int processes, const Keys& keys, const std::string& resume = "none") const {
    const auto result = Process(launched(processes, arguments(name, resume, keys)), {"OMP_NUM_THREADS=1"}).wait();
    ASSERT_EQ(result.code, 0) << name << ": " << result.err;
  }

  TemporaryFolder folder_;
  TinyWorld world_;
};

// Steps of a few sequences, so that some processes have text alone, or nothing. Few rows make gradients that are all
// rounding in places: an epsilon between those and the real ones (1e-9, 1e-3) keeps AdamW from blowing them up to whole
// updates, which then grow in all that follows.
const Keys kSmallSteps{"data.tokens_per_step=64", "train.adam_epsilon=1e-6"};

Keys operator+(Keys a, const Keys& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST_F(Together, EveryLayoutTrainsTheSame) {
  train("one", 1, {});
  train("one-small", 1, kSmallSteps);
  struct Case {
    std::string name;
    int processes;
    Keys keys;
  };
  for (const Case& c :
       std::vector<Case>{{"data2", 2, {}},
                         {"expert2", 2, {"parallel.expert=2"}},
                         {"expert2-accumulated", 2, {"parallel.expert=2", "train.accumulation=2"}},
                         {"sharded2", 2, {"parallel.shard_base=true", "parallel.shard_optimizer=true"}},
                         {"data2-expert2", 4, {"parallel.expert=2", "parallel.bucket_mib=0.02"}},
                         {"data2-expert2-sharded",
                          4,
                          {"parallel.expert=2", "parallel.shard_base=true", "parallel.shard_optimizer=true"}},
                         {"expert4", 4, {"parallel.expert=4"}}}) {
    train(c.name, c.processes, c.keys);
    expect_same_training(run_path("one"), run_path(c.name), c.name);
  }
  for (const Case& c : std::vector<Case>{{"data4-small", 4, {}}, {"data2-expert2-small", 4, {"parallel.expert=2"}}}) {
    train(c.name, c.processes, c.keys + kSmallSteps);
    expect_same_training(run_path("one-small"), run_path(c.name), c.name);
  }
  // What was measured over all processes.
  const auto held_out = [&](const std::string& name) {
    return moegraft::testing::metrics_of(run_path(name)).evaluations.back().nll.at("image");
  };
  EXPECT_NEAR(held_out("one"), held_out("data2-expert2"), 1e-4);
  const auto layers = [&](const std::string& name) {
    return run::read_routing(run_path(name) / "routing.jsonl").at(0).report.layers;
  };
  EXPECT_EQ(layers("one").size(), layers("data2-expert2").size());
  EXPECT_EQ(layers("one").at(0).modalities.at(1).tokens, layers("data2-expert2").at(0).modalities.at(1).tokens)
      << "of images";
}

// Each layout rounds other partial sums to bf16, by up to 2^-8 of them a micro-batch: losses agree to a share of that.
// Resumed in another layout, it goes on alike.
TEST_F(Together, Bf16GradientsTrainAlikeInEveryLayout) {
  const Keys narrow = Keys{"train.gradients=bf16", "train.accumulation=2"};
  train("narrow", 1, narrow);
  train("narrow-data2", 2, narrow + Keys{"parallel.shard_optimizer=true", "parallel.bucket_mib=0.02"});
  train("narrow-expert2", 2, narrow + Keys{"parallel.expert=2"});
  const auto one = training_lines(run_path("narrow"));
  for (const char* name : {"narrow-data2", "narrow-expert2"})
    for (const auto& [step, line] : training_lines(run_path(name))) {
      EXPECT_NEAR(line.loss, one.at(step).loss, 1e-3 * one.at(step).loss) << name << " step " << step;
      EXPECT_NEAR(line.grad_norm, one.at(step).grad_norm, 1e-2 * one.at(step).grad_norm) << name << " step " << step;
    }
  train("narrow-part", 2, narrow + Keys{"parallel.expert=2"});
  fs::remove_all(run_path("narrow-part") / "checkpoints" / checkpoint::step_name(8));
  train("narrow-part", 2, narrow + Keys{"parallel.expert=2"}, "auto");
  expect_same_bits(run_path("narrow-expert2"), run_path("narrow-part"));
}

TEST_F(Together, ATrainedBaseIsTheSameWithSeveralProcesses) {
  const Keys keys{"model.path=\"\"",
                  "modalities={}",
                  "adapters=[]",
                  "data.train=[{path: " + world_.text_shards.string() + "}]",
                  "data.eval=[]",
                  "train.base_weights=full",
                  "model.init={family: qwen3_moe, tokenizer: " + world_.tokenizer.string() +
                      ", hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 8, num_experts: 4, "
                      "num_experts_per_tok: 2, moe_intermediate_size: 24, max_positions: 256, "
                      "embedding_std: 0.3, router_aux_loss_coef: 0.01}"};
  train("base1", 1, keys);
  train("base2", 2, keys);
  const auto a = training_lines(run_path("base1")), b = training_lines(run_path("base2"));
  ASSERT_EQ(a.size(), 8u);
  // The balance loss is each process's own mean, as everywhere: the losses agree, the gradients nearly.
  EXPECT_NEAR(a.at(1).loss, b.at(1).loss, 1e-5 * a.at(1).loss);
  for (const auto& [step, line] : a) EXPECT_NEAR(line.loss, b.at(step).loss, 5e-3 * line.loss) << step;
  EXPECT_TRUE(fs::exists(run_path("base2") / "model" / "model.safetensors"));
}

TEST_F(Together, ResumesInAnyLayout) {
  const Keys square{"parallel.expert=2"};
  train("whole", 4, square);
  const auto stop_at_4 = [&](const std::string& name) {
    fs::copy(run_path("whole"), run_path(name), fs::copy_options::recursive);
    fs::remove_all(run_path(name) / "checkpoints" / checkpoint::step_name(8));
  };
  stop_at_4("same");
  train("same", 4, square, "auto");
  expect_same_bits(run_path("whole"), run_path("same"));
  struct Case {
    std::string name;
    int processes;
    Keys keys;
  };
  for (const Case& c : std::vector<Case>{{"alone", 1, {}},
                                         {"experts4", 4, {"parallel.expert=4"}},
                                         {"data2", 2, {"parallel.shard_optimizer=true"}},
                                         {"expert2", 2, {"parallel.expert=2"}}}) {
    stop_at_4(c.name);
    train(c.name, c.processes, c.keys, "auto");
    expect_same_training(run_path("whole"), run_path(c.name), c.name);
  }
}

// The children of a process, from /proc.
std::vector<pid_t> children_of(pid_t parent) {
  std::vector<pid_t> out;
  std::ifstream in("/proc/" + std::to_string(parent) + "/task/" + std::to_string(parent) + "/children");
  for (pid_t p; in >> p;) out.push_back(p);
  return out;
}

TEST_F(Together, AnyRankKilledAtAnyTimeLosesNothing) {
  const Keys keys{"parallel.expert=2", "train.steps=40", "checkpoint.every=3", "checkpoint.keep=3",
                  "parallel.timeout_seconds=20"};
  const auto start = Clock::now();
  train("calm", 2, keys);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  // The launcher brings the run back each time.
  Process p(launched(2, arguments("stormy", "auto", keys), {"--max-restarts", "100"}), {"OMP_NUM_THREADS=1"});
  Rng rng(11, "kill");
  int kills = 0;
  for (int round = 0; round < 12 && p.running(); ++round) {
    const auto until =
        Clock::now() + std::chrono::duration<double>((0.1 + rng.uniform()) * seconds * (0.4 + 0.1 * round));
    while (p.running() && Clock::now() < until) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const auto ranks = children_of(p.pid());
    if (!p.running() || ranks.empty()) continue;
    kill(ranks[rng.below(ranks.size())], SIGKILL);
    ++kills;
  }
  const auto result = p.wait();
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_GT(kills, 0);
  expect_same_bits(run_path("calm"), run_path("stormy"));
}

TEST_F(Together, ASignalToTheLauncherSavesEverywhere) {
  Process p(launched(2, arguments("signal", "none", {"train.steps=100000", "checkpoint.every=100000"})),
            {"OMP_NUM_THREADS=1"});
  for (int i = 0; i < 3000 && p.running() && training_lines(run_path("signal")).size() < 3; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  p.send(SIGTERM);
  const auto result = p.wait();
  EXPECT_EQ(result.code, run::kExitStopped) << result.err;
  EXPECT_EQ(training_lines(run_path("signal")).rbegin()->first, latest(run_path("signal")).step)
      << "nothing trained is lost";
}

TEST_F(Together, AHungRankEndsInATimeoutThatNamesIt) {
  Process p(launched(2, arguments("hung", "none", {"train.steps=100000", "parallel.timeout_seconds=3"})),
            {"OMP_NUM_THREADS=1"});
  for (int i = 0; i < 3000 && p.running() && training_lines(run_path("hung")).size() < 3; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const auto ranks = children_of(p.pid());
  ASSERT_EQ(ranks.size(), 2u);
  kill(ranks[1], SIGSTOP);
  const auto stopped = Clock::now();
  const auto result = p.wait();
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - stopped).count(),
            25.0);  // the time-out, and the launcher's patience with a process that does not end
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_NE(result.err.find("rank 1"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("step"), std::string::npos) << result.err;
}

TEST_F(Together, ASlowRankIsNamed) {
  Process p(launched(2, arguments("slow", "none", {"train.steps=60", "train.log_every=5"})), {"OMP_NUM_THREADS=1"});
  for (int i = 0; i < 3000 && p.running() && training_lines(run_path("slow")).empty(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const auto ranks = children_of(p.pid());
  ASSERT_EQ(ranks.size(), 2u);
  while (p.running()) {  // rank 1 runs a tenth of the time
    kill(ranks[1], SIGSTOP);
    std::this_thread::sleep_for(std::chrono::milliseconds(90));
    kill(ranks[1], SIGCONT);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const auto result = p.wait();
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_NE(result.err.find("rank 1 is a straggler"), std::string::npos) << result.err;
}

TEST_F(Together, BadInputEndsEveryRankWithALine) {
  struct Case {
    int processes;
    Keys keys;
    std::string expected;
    int code;
  };
  for (const Case& c :
       std::vector<Case>{{2, {"parallel.expert=3"}, "must divide the number of processes", 2},
                         {3, {"parallel.expert=3"}, "must divide the 4 experts", 2},
                         {2,
                          {"parallel.expert=2", "train.base_weights=full", "train.allow_text_drift=true"},
                          "needs a frozen base",
                          2},
                         {2, {"data.train[0].path=/nowhere"}, "/nowhere", 1}}) {
    const auto start = Clock::now();
    const auto result = Process(launched(c.processes, arguments("bad", "none", c.keys))).wait();
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - start).count(), 20.0) << c.expected;
    EXPECT_EQ(result.code, c.code) << result.err;
    EXPECT_NE(result.err.find(c.expected), std::string::npos) << result.err;
    fs::remove_all(run_path("bad"));
  }
}

TEST_F(Together, EveryRankEndsWithTheCodeOfRank0) {
  const Keys short_run{"train.steps=1"};
  ASSERT_EQ(Process(launched(2, arguments("twice", "none", short_run))).wait().code, 0);
  const auto again = Process(launched(2, arguments("twice", "none", short_run))).wait();
  EXPECT_EQ(again.code, 2) << again.err;
  EXPECT_NE(again.err.find("[rank 1] rank 0 could not start the run: the directory"), std::string::npos) << again.err;
}

// Two processes started by hand, each with a command of its own.
TEST_F(Together, ProcessesThatDisagreeAllEndWithALine) {
  const auto rank = [](int r, int port) {
    return Keys{"RANK=" + std::to_string(r), "WORLD_SIZE=2",          "LOCAL_RANK=" + std::to_string(r),
                "LOCAL_WORLD_SIZE=2",        "MASTER_ADDR=127.0.0.1", "MASTER_PORT=" + std::to_string(port),
                "OMP_NUM_THREADS=1"};
  };
  const auto both = [&](const Keys& first, const Keys& second) {
    const int port = moegraft::distributed::free_port();
    Process a(launched(1, arguments("odd", "none", first)), rank(0, port)),
        b(launched(1, arguments("odd", "none", second)), rank(1, port));
    return std::pair(a.wait(), b.wait());
  };
  const Keys patient{"parallel.timeout_seconds=20"};
  {
    const auto [a, b] = both(patient, patient + Keys{"train.lora.lr=0.5"});
    for (const auto* r : {&a, &b}) {
      EXPECT_NE(r->code, 0);
      EXPECT_NE(r->err.find("train.lora.lr"), std::string::npos) << r->err;
    }
  }
  {
    const auto [a, b] = both(patient, patient + Keys{"train.lora.lr=fast"});
    EXPECT_NE(a.code, 0);
    EXPECT_EQ(b.code, 2);
    EXPECT_NE(a.err.find("rank 1"), std::string::npos) << a.err;
    EXPECT_NE(a.err.find("lr"), std::string::npos) << a.err;
  }
  EXPECT_FALSE(fs::exists(run_path("odd"))) << "nothing is made before all agree";
  // One that never comes.
  const auto alone = Process(launched(1, arguments("odd", "none", {"parallel.timeout_seconds=2"})),
                             rank(0, moegraft::distributed::free_port()))
                         .wait();
  EXPECT_EQ(alone.code, 1);
  EXPECT_NE(alone.err.find("1"), std::string::npos) << alone.err;
  EXPECT_NE(alone.err.find("rank"), std::string::npos) << alone.err;
}

TEST_F(Together, TorchrunBringsARunBack) {
  Keys argv = moegraft::testing::torchrun(test_source_dir());
  if (argv.empty()) GTEST_SKIP() << "no torchrun that works: set MOEGRAFT_TORCHRUN, or tools/setup.sh --tests";
  const Keys keys{"train.steps=40", "checkpoint.every=5"};
  train("calm", 2, keys);
  argv = argv + Keys{"--no-python",
                     "--nproc-per-node",
                     "2",
                     "--max-restarts",
                     "3",
                     "--master-port",
                     std::to_string(moegraft::distributed::free_port()),
                     moegraft::testing::moegraft_binary().string()};
  argv = argv + arguments("agent", "auto", keys);
  Process p(argv, {"OMP_NUM_THREADS=1"});
  for (int i = 0; i < 6000 && p.running() && training_lines(run_path("agent")).size() < 12; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const auto ranks = children_of(p.pid());
  ASSERT_FALSE(ranks.empty()) << p.errors();
  kill(ranks.back(), SIGKILL);
  const auto result = p.wait();
  ASSERT_EQ(result.code, 0) << result.err;
  expect_same_bits(run_path("calm"), run_path("agent"));
}

}  // namespace
}  // namespace moegraft::train
