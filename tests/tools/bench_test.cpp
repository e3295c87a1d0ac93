// moegraft bench: what it counts and says. How fast anything is, is never tested here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "libtorch.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

using io::Json;
using testing::run_moegraft;

// The tiny world's base: D 32, 2 layers, 4 heads and 2 KV heads of 8, 4 experts of width 24, 2 per token.
constexpr double kLayers = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 4 * 32 + 2 * 3 * 32 * 24);
constexpr double kLora4 = 2 * 2 * 3 * 4 * (32 + 24);  // layers, experts per token, sites, rank, in + out

class Bench : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (testing::moegraft_binary().empty()) return;
    folder_ = new testing::TemporaryFolder;
    base_ = new std::string(testing::make_tiny_world(folder_->path()).base.string());
    vocab_ = double(io::read_json(std::filesystem::path(*base_) / "config.json")["vocab_size"].get<int64_t>());
  }
  static void TearDownTestSuite() {
    delete base_;
    delete folder_;
    base_ = nullptr, folder_ = nullptr;
  }
  void SetUp() override {
    if (!base_) GTEST_SKIP() << "the moegraft binary is not built";
  }
  static Json bench(std::vector<std::string> args) {
    args.insert(args.begin(), "bench");
    args.push_back("--json");
    const auto r = run_moegraft(args);
    EXPECT_EQ(r.code, 0) << r.err;
    return r.code == 0 ? Json::parse(r.out) : Json::object();
  }
  static std::vector<std::string> step(std::vector<std::string> more) {
    std::vector<std::string> args{"step", *base_,    "--dtype", "float32", "--rank", "4",        "--steps",
                                  "2",    "--batch", "2",       "--seq",   "20",     "--matmul", "256"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  static inline testing::TemporaryFolder* folder_ = nullptr;
  static inline std::string* base_ = nullptr;
  static inline double vocab_ = 0;
};

TEST_F(Bench, AStepCountsTheWorkOfActiveParameters) {
  const Json j = bench(step({}));
  for (const char* key : {"tokens_per_s", "best_step_s", "median_step_s", "peak_mib", "vm_hwm_mib", "matmul_gflops",
                          "model_gflops_per_s", "share_of_limit", "trained_parameters", "threads"})
    EXPECT_GT(j.value(key, 0.0), 0.0) << key;
  EXPECT_EQ(j["step_s"].size(), 2u);
  EXPECT_EQ(j["tokens"], 40);
  EXPECT_EQ(j["gate"], "all");
  const double active = kLayers + 32 * vocab_;
  EXPECT_DOUBLE_EQ(j["flops_per_token"].get<double>(), 4 * active + 6 * kLora4);
  EXPECT_DOUBLE_EQ(j["share_of_limit"].get<double>(), j["flops_per_token"].get<double>() * 40 /
                                                          j["best_step_s"].get<double>() / 1e9 /
                                                          j["matmul_gflops"].get<double>());
  EXPECT_DOUBLE_EQ(j["trained_parameters"].get<double>(),
                   kLora4 * 2);  // all 4 experts instead of the 2 that a token takes
}

TEST_F(Bench, WithoutAKindItIsAStep) {
  auto args = step({});
  const Json with = bench(args);
  args.erase(args.begin());
  const Json without = bench(args);
  EXPECT_EQ(with["loss"], without["loss"]);
  EXPECT_EQ(with["flops_per_token"], without["flops_per_token"]);
}

// 10 tokens of text, then a begin token and 9 codes. Text before the picture needs no gradient, and LoRA meets the
// picture alone.
TEST_F(Bench, ImageTokensNeedGradientsFromTheFirstOneOn) {
  const Json j = bench(step({"--image-share", "0.5", "--codes", "6"}));
  EXPECT_EQ(j["gate"], "modality");
  EXPECT_DOUBLE_EQ(j["image_share"].get<double>(), 0.5);
  const double text_head = 32 * vocab_, image_head = 32 * 8;
  EXPECT_DOUBLE_EQ(j["flops"]["forward"].get<double>(), 2 * 2 * (20 * kLayers + 9 * text_head + 11 * image_head));
  EXPECT_DOUBLE_EQ(j["flops"]["activation_gradient"].get<double>(), 2 * 2 * (10 * kLayers + 10 * image_head));
  EXPECT_DOUBLE_EQ(j["flops"]["lora"].get<double>(), 2 * 10 * 6 * kLora4);
  EXPECT_NE(j["loss"][0], j["loss"][1]) << "the step must train";
  // How it is done changes neither the work nor the result.
  for (const auto& more : std::vector<std::vector<std::string>>{{"--whole-backward"}, {"--recompute", "2"}}) {
    std::vector<std::string> options{"--image-share", "0.5", "--codes", "6"};
    options.insert(options.end(), more.begin(), more.end());
    const Json other = bench(step(options));
    EXPECT_EQ(other["flops"]["activation_gradient"], j["flops"]["activation_gradient"]) << more[0];
    for (int i = 0; i < 2; ++i)
      EXPECT_NEAR(other["loss"][i].get<double>(), j["loss"][i].get<double>(), 1e-5) << more[0];
  }
  // Labels on the picture alone: 10 predictions, all over its own rows.
  const Json image = bench(step({"--image-share", "0.5", "--codes", "6", "--labels", "image"}));
  EXPECT_DOUBLE_EQ(image["flops"]["forward"].get<double>(), 2 * 2 * (20 * kLayers + 10 * image_head));
}

TEST_F(Bench, TheClosedGateLeavesTheFrozenBase) {
  const Json j = bench(step({"--gate", "none", "--codes", "6"}));
  EXPECT_EQ(j["rank"], 0);
  EXPECT_EQ(j["flops"]["lora"], 0.0);
  EXPECT_EQ(j["flops"]["forward"], j["flops"]["activation_gradient"]);
  EXPECT_NE(j["loss"][0], j["loss"][1]) << "gradients must flow to the first position's new row";
}

TEST_F(Bench, RaggedLengthsPackTheSameTokens) {
  const Json fixed = bench(step({})), ragged = bench(step({"--lengths", "ragged"}));
  EXPECT_EQ(ragged["tokens"], 40);
  EXPECT_GT(ragged["sequences"].get<int64_t>(), fixed["sequences"].get<int64_t>());
  EXPECT_EQ(ragged["flops_per_token"], fixed["flops_per_token"]);
  EXPECT_LT(ragged["flops"]["attention_scores_not_counted"].get<double>(),
            fixed["flops"]["attention_scores_not_counted"].get<double>());
}

// A config.json is enough. Logits of random weights are about standard normal: the loss begins at ln V + 1/2.
TEST_F(Bench, RandomWeightsNeedAConfigAlone) {
  const std::filesystem::path config = *folder_ / "a-model.json";
  std::filesystem::copy_file(*base_ + "/config.json", config, std::filesystem::copy_options::overwrite_existing);
  const std::vector<std::string> rest{"--dtype", "float32", "--rank", "4",  "--steps",  "2",
                                      "--batch", "2",       "--seq",  "20", "--matmul", "256"};
  const auto of = [&](std::vector<std::string> more) {
    std::vector<std::string> args{"step", "--random"};
    args.insert(args.end(), more.begin(), more.end());
    args.insert(args.end(), rest.begin(), rest.end());
    return bench(args);
  };
  const Json j = of({config.string()}), again = of({*base_}), cut = of({config.string(), "--layers", "1"});
  EXPECT_EQ(j["random"], true);
  EXPECT_NEAR(j["loss"][0].get<double>(), std::log(vocab_) + 0.5, 0.3);
  EXPECT_EQ(j["loss"], again["loss"]);
  EXPECT_LT(j["loss"][1], j["loss"][0]);
  EXPECT_EQ(j["flops_per_token"], bench(step({}))["flops_per_token"]);
  EXPECT_EQ(j["layers"], 2);
  EXPECT_EQ(cut["layers"], 1);
  EXPECT_DOUBLE_EQ(j["flops_per_token"].get<double>() - cut["flops_per_token"].get<double>(),
                   4 * kLayers / 2 + 6 * kLora4 / 2);
  const Json text = bench({"generate", "--random", config.string(), "--dtype", "float32", "--batch", "1", "--prompt",
                           "5", "--tokens", "4", "--pictures", "0", "--rounds", "1"});
  EXPECT_EQ(text["ids"][0].size(), 4u);
}

// As training runs a step: several micro-batches, the gradients' norm, moments in 8 bits, statistics of routing.
TEST_F(Bench, AStepCanBeWhatTrainingDoes) {
  const std::string ids = (*folder_ / "step-ids.safetensors").string();
  io::save_safetensors(ids, {{"input_ids", at::arange(3, 43).view({2, 20})}});
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"step", *base_, "--dtype", "float32", "--ids", ids, "--rank", "64", "--steps", "4",
                               "--matmul", "256"});
    return bench(more);
  };
  const Json plain = with({}), twice = with({"--accumulate", "2"}), bits = with({"--optimizer", "adamw_8bit"}),
             clipped = with({"--clip", "1e-15"}), routed = with({"--routing", "--kernels"});
  EXPECT_EQ(twice["tokens"], 80);
  EXPECT_EQ(twice["sequences"], 4);
  EXPECT_EQ(twice["accumulate"], 2);
  EXPECT_EQ(twice["flops_per_token"], plain["flops_per_token"]);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(twice["loss"][i].get<double>(), plain["loss"][i].get<double>(), 1e-5) << "the mean of the same twice";
    EXPECT_NEAR(bits["loss"][i].get<double>(), plain["loss"][i].get<double>(), 1e-2);
    // A gradient far below epsilon moves nothing.
    EXPECT_NEAR(clipped["loss"][i].get<double>(), plain["loss"][0].get<double>(), 1e-5);
    EXPECT_EQ(routed["loss"][i], plain["loss"][i]);
  }
  EXPECT_NE(bits["loss"][3], plain["loss"][3]) << "8 bits were used";
  const Json random = bench(step({"--accumulate", "2"}));
  EXPECT_NE(random["loss"][0], bench(step({}))["loss"][0]) << "micro-batches have their own ids";
  const double entropy = routed["routing"]["text"]["load_entropy"];
  EXPECT_TRUE(entropy > 0 && entropy <= 1) << entropy;
  EXPECT_GE(routed["routing"]["text"]["worst_imbalance"].get<double>(), 1.0);
  EXPECT_TRUE(routed["kernels"].contains("absent")) << "a CPU has no kernels, and says so";
  EXPECT_TRUE(plain["card"].is_null() && plain["reserved_mib"].is_null());
  EXPECT_FALSE(plain["commit"].get<std::string>().empty());
}

TEST_F(Bench, AProfileAccountsForTheWholeStep) {
  const Json p = bench(step({"--profile"}))["profile"];
  std::vector<std::string> names;
  double phases = 0, outside = 0, ops = 0;
  for (const auto& phase : p["phases"]) {
    names.push_back(phase["name"]);
    phases += phase["s"].get<double>();
    outside += phase["unmarked_s"].get<double>();
  }
  EXPECT_EQ(names, (std::vector<std::string>{"forward", "loss", "backward", "optimizer"}));
  double last = 1e9;
  bool backward = false;
  for (const auto& op : p["ops"]) {
    ops += op["self_s"].get<double>();
    EXPECT_LE(op["self_s"].get<double>(), last) << "sorted";
    last = op["self_s"];
    backward |= op["phase"] == "backward";
    EXPECT_GT(op["calls"].get<int64_t>(), 0);
  }
  EXPECT_TRUE(backward);
  EXPECT_NEAR(phases, p["total_s"].get<double>(), 1e-9);
  EXPECT_NEAR(ops + outside, p["total_s"].get<double>(), 1e-6 + 1e-3 * p["total_s"].get<double>())
      << "self times and what lies outside operations are the whole";
}

TEST_F(Bench, OperationsAgreeWithPlainLibTorch) {
  const Json j =
      bench({"ops", "--dtype",    "float32", "--tokens", "48", "--seq",    "20", "--hidden", "32", "--width",
             "16",  "--experts",  "4",       "--top-k",  "2",  "--rank",   "4",  "--heads",  "4",  "--kv-heads",
             "2",   "--head-dim", "8",       "--vocab",  "64", "--rounds", "1",  "--matmul", "256"});
  std::set<std::string> names;
  for (const auto& op : j["ops"]) {
    names.insert(op["op"]);
    EXPECT_LT(op["difference"].get<double>(), 1e-5) << op.dump();
    EXPECT_GT(op["ms"].get<double>(), 0);
    EXPECT_GT(op["plain_ms"].get<double>(), 0);
    if (op["op"] == "moe_ffn") {
      const double expert = 2.0 * 48 * 2 * 3 * 32 * 16, lora = 2.0 * 48 * 2 * 3 * 4 * (32 + 16),
                   flops = op["backward"].get<bool>() ? 2 * expert + 3 * lora : expert + lora;
      EXPECT_NEAR(op["gflops_per_s"].get<double>() * op["ms"].get<double>() * 1e6, flops, 1e-6 * flops);
    }
  }
  EXPECT_EQ(names, (std::set<std::string>{"moe_ffn", "dispatch+permute", "packed_attention", "frozen_linear q,k,v",
                                          "rms_norm", "residual_norm", "rotary", "linear_cross_entropy"}));
}

TEST_F(Bench, GenerationWritesGreedyText) {
  const std::vector<std::string> args{"generate", *base_, "--dtype",    "float32", "--batch", "2",  "--prompt", "9",
                                      "--tokens", "5",    "--pictures", "3",       "--codes", "16", "--rank",   "4",
                                      "--rounds", "1",    "--profile"};
  const Json j = bench(args);
  for (const char* key :
       {"prefill_tokens_per_s", "decode_tokens_per_s", "decode_step_ms", "image_tokens_per_s", "peak_mib"})
    EXPECT_GT(j.value(key, 0.0), 0.0) << key;
  std::vector<std::string> phases;
  for (const auto& phase : j["profile"]["phases"]) phases.push_back(phase["name"]);
  EXPECT_EQ(phases, (std::vector<std::string>{"prefill", "decode", "image prompt", "image codes"}));
  ASSERT_EQ(j["ids"].size(), 2u);
  // The same continuation without a cache: each next id is the plain forward's argmax.
  std::vector<int64_t> ids;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{0});
  const at::Tensor prompt = at::empty({2, 9}, at::kLong).random_(3, int64_t(vocab_), generator);
  for (int64_t t = 0; t < 9; ++t) ids.push_back(prompt[1][t].item<int64_t>());
  for (const auto& id : j["ids"][1]) ids.push_back(id);
  io::save_safetensors(*folder_ / "ids.safetensors", {{"input_ids", at::tensor(ids).view({1, 14})}});
  const auto logits = run_moegraft({"logits", *base_, "--ids", (*folder_ / "ids.safetensors").string(), "-o",
                                    (*folder_ / "logits.safetensors").string()});
  ASSERT_EQ(logits.code, 0) << logits.err;
  const at::Tensor next = io::load_safetensors(*folder_ / "logits.safetensors").at("logits")[0].argmax(-1);
  for (int64_t t = 8; t < 13; ++t) EXPECT_EQ(next[t].item<int64_t>(), ids[t + 1]) << t;
}

TEST_F(Bench, GrowthRunsEachPointByItself) {
  const Json j = bench({"growth",   *base_,  "--dtype",   "float32", "--axes",  "tokens,experts",
                        "--tokens", "16,64", "--experts", "8",       "--batch", "2",
                        "--seq",    "16",    "--rank",    "4",       "--steps", "1",
                        "--matmul", "256"});
  ASSERT_EQ(j["points"].size(), 3u);
  EXPECT_EQ(j["points"][1]["tokens"], 64);
  EXPECT_EQ(j["points"][2]["experts"], 8);
  EXPECT_EQ(j["points"][2]["trained_parameters"].get<int64_t>(), int64_t(kLora4) * 4);
  for (const auto& p : j["points"]) {
    EXPECT_GT(p["peak_mib"].get<double>(), 0);
    EXPECT_GT(p["best_step_s"].get<double>(), 0);
  }
}

TEST_F(Bench, AFailedPointFailsTheCommandAndIsNamed) {
  std::filesystem::create_directories(*folder_ / "broken");
  std::filesystem::copy_file(*base_ + "/config.json", *folder_ / "broken" / "config.json");
  const auto r =
      run_moegraft({"bench", "growth", (*folder_ / "broken").string(), "--axes", "ranks", "--ranks", "4", "--json"});
  EXPECT_EQ(r.code, 1);
  EXPECT_NE(r.err.find("ranks 4: exit 1"), std::string::npos) << r.err;
  EXPECT_NE(Json::parse(r.out)["points"][0]["error"].get<std::string>().find("safetensors"), std::string::npos)
      << r.out;
}

TEST_F(Bench, BadOptionsAreOneLineAndExitWithTwo) {
  const std::vector<std::vector<std::string>> cases{
      {"bench"},
      {"bench", "step"},
      {"bench", "generate"},
      {"bench", "growth"},
      {"bench", "step", *base_, "--gate", "half"},
      {"bench", "step", *base_, "--gate", "modality"},
      {"bench", "step", *base_, "--quantize", "nf4"},
      {"bench", "step", *base_, "--dtype", "int8"},
      {"bench", "step", *base_, "--sites", "gate,wrong"},
      {"bench", "step", *base_, "--labels", "image"},
      {"bench", "--rank", "4", "generate", *base_},
      {"bench", "growth", *base_, "--axes", "width"},
      {"bench", "growth", *base_, "--experts", "1"},
      {"bench", "growth", *base_, "--tokens", "700"},
      {"bench", "generate", *base_, "--prompt", "1000"},
      {"bench", "generate", *base_, "--prompt", "4", "--tokens", "4", "--cuda-graphs"},
      {"bench", "ops", "--only", "nothing"},
      {"bench", "ops", "--top-k", "9", "--experts", "8"},
      {"bench", "step", *base_, "--random", *base_},
      {"bench", "step", *base_, "--layers", "1"},
      {"bench", "step", "--random", *base_, "--layers", "3"}};
  for (const auto& args : cases) {
    const auto r = run_moegraft(args);
    std::string text;
    for (const auto& a : args) text += a + " ";
    EXPECT_EQ(r.code, 2) << text << r.err;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << text << r.err;
    EXPECT_EQ(r.out, "") << text;
  }
  for (const auto& args : std::vector<std::vector<std::string>>{{"bench", "step", *base_, "--batch", "0"},
                                                                {"bench", "step", *base_, "--image-share", "2"},
                                                                {"bench", "step", *base_, "--lengths", "odd"},
                                                                {"bench", "step", *base_, "--optimizer", "sgd"},
                                                                {"bench", "fly", "x", "y"}})
    EXPECT_EQ(run_moegraft(args).code, 2) << args.back();
}

// The peers' scripts stand on the same ids and count the same loss.
TEST_F(Bench, ThePeerBeginsWithTheSameLoss) {
  const std::string python = testing::reference_python(test_source_dir(), "torch, transformers, peft, safetensors");
  if (python.empty()) GTEST_SKIP() << "no Python with transformers and PEFT (tools/setup.sh --tests installs one)";
  const std::string ids = (*folder_ / "peer-ids.safetensors").string();
  io::save_safetensors(ids, {{"input_ids", at::arange(3, 63).view({2, 30})}});
  const auto peer =
      testing::Process({python, test_source_dir() + "/tests/bench/peer_step.py", *base_, "--dtype", "float32", "--rank",
                        "4", "--sites", "gate,up,down,q,v", "--steps", "2", "--ids", ids})
          .wait();
  ASSERT_EQ(peer.code, 0) << peer.err;
  const Json theirs = Json::parse(peer.out),
             ours = bench({"step", *base_, "--dtype", "float32", "--rank", "4", "--sites", "gate,up,down,q,v",
                           "--steps", "2", "--matmul", "256", "--ids", ids});
  EXPECT_NEAR(ours["loss"][0].get<double>(), theirs["loss"][0].get<double>(), 1e-4);
  EXPECT_LT(theirs["loss"][1].get<double>(), theirs["loss"][0].get<double>());
  for (const char* key : {"tokens_per_s", "step_s", "best_step_s", "peak_mib", "matmul_gflops"})
    EXPECT_TRUE(theirs.contains(key)) << key;
}

// The checkpoint that a machine with a card makes for itself: in shards, of a cut, with other sizes.
TEST_F(Bench, AModelWrittenShardByShardLoads) {
  const std::string root = test_source_dir(), python = testing::reference_python(root, "torch, safetensors");
  if (python.empty()) GTEST_SKIP() << "no Python with torch and safetensors";
  const std::string dir = (*folder_ / "sharded").string(), gpu = root + "/tests/bench/gpu/";
  const auto made = testing::Process({python, gpu + "make_model.py", gpu + "tiny.json", dir, "--layers", "3",
                                      "--layers-per-shard", "2", "--set", "vocab_size=300"})
                        .wait();
  ASSERT_EQ(made.code, 0) << made.err;
  EXPECT_TRUE(std::filesystem::exists(dir + "/model-00003-of-00003.safetensors"));
  const Json j = bench({"step", dir, "--dtype", "bfloat16", "--rank", "4", "--steps", "1", "--batch", "2", "--seq",
                        "20", "--matmul", "256"});
  EXPECT_EQ(j["layers"], 3);
  EXPECT_NEAR(j["loss"][0].get<double>(), std::log(300.0) + 0.5, 0.3);
  const auto refused =
      testing::Process({python, gpu + "make_model.py", gpu + "tiny.json", dir, "--set", "width=3"}).wait();
  EXPECT_NE(refused.err.find("has no width"), std::string::npos) << refused.err;
}

// Every trainer, alone and beside a busy loop: each of the figures is there, and the ratio is theirs. How large it is
// depends on the machine.
TEST_F(Bench, ContentionMeasuresEveryTrainer) {
  const Json j = bench({"contention", *base_, "--busy", "1", "--steps", "1", "--rounds", "1", "--batch", "2", "--seq",
                        "16", "--rank", "4"});
  EXPECT_EQ(j["bench"], "contention");
  EXPECT_EQ(j["busy"], 1);
  ASSERT_EQ(j["trainers"].size(), 3u);
  for (const char* name : {"codec", "graft", "base"}) {
    const Json& trainer = j["trainers"][name];
    for (const char* side : {"alone", "beside"})
      for (const char* key : {"cpu_s", "median_cpu_s", "step_s"})
        EXPECT_GT(trainer[side].value(key, 0.0), 0.0) << name << " " << side << " " << key;
    EXPECT_DOUBLE_EQ(trainer["ratio"].get<double>(),
                     trainer["beside"]["cpu_s"].get<double>() / trainer["alone"]["cpu_s"].get<double>())
        << name;
  }
}

TEST_F(Bench, ContentionMakesItsOwnModelAndRefusesUnknownTrainers) {
  const Json j = bench({"contention", "--trainers", "graft", "--busy", "1", "--steps", "1", "--rounds", "1", "--batch",
                        "1", "--seq", "8"});
  EXPECT_EQ(j["trainers"].size(), 1u);
  EXPECT_GT(j["trainers"]["graft"].value("ratio", 0.0), 0.0);
  EXPECT_EQ(run_moegraft({"bench", "contention", "--trainers", "all"}).code, 2);
}

}  // namespace
}  // namespace moegraft
