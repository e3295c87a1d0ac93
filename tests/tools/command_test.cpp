// The command line as a user meets it: shipped configs, dry runs, parity figures, exit codes.
#include <gtest/gtest.h>
#include <sched.h>

#include <fstream>
#include <regex>

#include "libtorch.h"
#include "moegraft/codec/train.h"
#include "moegraft/config/config.h"
#include "moegraft/evaluate/config.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/run/records.h"
#include "moegraft/run/run_config.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;
using testing::run_moegraft;
const fs::path kConfigs = fs::path(test_source_dir()) / "configs";

class Command : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
  }
};

TEST_F(Command, ProcessesOfALaunchStayOnTheirNodes) {
  cpu_set_t mine;
  std::vector<int> cpus;
  ASSERT_EQ(sched_getaffinity(0, sizeof mine, &mine), 0);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &mine)) cpus.push_back(cpu);
  if (cpus.size() < 2) GTEST_SKIP() << "one core: nothing to share";
  testing::TemporaryFolder folder;
  for (int node : {0, 1}) {
    fs::create_directories(folder.path() / ("node" + std::to_string(node)));
    std::ofstream(folder.path() / ("node" + std::to_string(node)) / "cpulist") << cpus[size_t(node)] << '\n';
  }
  const std::string model = (fs::path(test_source_dir()) / "tests/golden/model/qwen3").string();
  const auto launch = [&](const std::string& nodes) {
    const auto r = run_moegraft({"launch", "--nproc", "2", "--", "-v", "--numa", nodes, "inspect", model});
    EXPECT_EQ(r.code, 0) << r.err;
    return r.err;
  };
  const std::string two = launch(folder.path().string());
  EXPECT_NE(two.find("on NUMA node 0"), std::string::npos) << two;
  EXPECT_NE(two.find("on NUMA node 1"), std::string::npos) << two;
  EXPECT_EQ(launch("off").find("NUMA"), std::string::npos);
}

TEST_F(Command, TheCpuPathIsShownAndAWrongOneRefused) {
  const std::string model = (fs::path(test_source_dir()) / "tests/golden/model/qwen3").string();
  const auto inspect = [&](const char* path) { return run_moegraft({"--cpu-path", path, "inspect", model, "--json"}); };
  const auto best = inspect("auto"), portable = inspect("portable"), wrong = inspect("avx1024");
  ASSERT_EQ(best.code, 0) << best.err;
  ASSERT_EQ(portable.code, 0) << portable.err;
  const io::Json a = io::Json::parse(best.out).at("cpu"), b = io::Json::parse(portable.out).at("cpu");
  EXPECT_EQ(a.at("path"), a.at("best_path"));
  EXPECT_EQ(b.at("path"), "portable");
  EXPECT_EQ(b.at("best_path"), a.at("best_path"));
  EXPECT_NE(b.at("bfloat16").get<std::string>().find("ATen"), std::string::npos);
  EXPECT_EQ(wrong.code, 2);
  EXPECT_NE(wrong.err.find("--cpu-path must be one of auto, portable, avx2, avx512, avx512_bf16, amx, got \"avx1024\""),
            std::string::npos)
      << wrong.err;
  if (a.at("best_path") == "amx") return;
  const auto missing = inspect("amx");
  EXPECT_EQ(missing.code, 2);
  EXPECT_NE(missing.err.find("--cpu-path amx: this CPU (or build) has no such path; its best one is " +
                             a.at("best_path").get<std::string>()),
            std::string::npos)
      << missing.err;
}

TEST_F(Command, WhatWasAVariableOfTheEnvironmentIsAnOptionOrAKey) {
  const std::string model = (fs::path(test_source_dir()) / "tests/golden/model/qwen3").string();
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"MOEGRAFT_CPU_PATH=portable", "give --cpu-path portable before the command, or model.cpu_path in a run's YAML"},
      {"MOEGRAFT_ATTENTION=flash", "give --attention flash before the command, or model.attention in a run's YAML"},
      {"MOEGRAFT_NUMA=off", "give --numa off before the command, or parallel.numa in a run's YAML"},
  };
  for (const auto& [variable, line] : cases) {
    const auto r = testing::Process({testing::moegraft_binary().string(), "inspect", model}, {variable}).wait();
    EXPECT_EQ(r.code, 2) << variable;
    EXPECT_NE(r.err.find(variable + " is no longer read: " + line), std::string::npos) << r.err;
  }
  EXPECT_EQ(
      testing::Process({testing::moegraft_binary().string(), "inspect", model}, {"MOEGRAFT_CPU_PATH="}).wait().code, 0)
      << "an empty one says nothing";
  const auto launched = run_moegraft({"--cpu-path", "portable", "launch", "--nproc", "2", "--", "inspect", model});
  EXPECT_EQ(launched.code, 2);
  EXPECT_NE(launched.err.find("moegraft launch --nproc 2 -- --cpu-path portable train"), std::string::npos)
      << launched.err;
}

TEST_F(Command, ARunsYamlKeepsItToACpuPath) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  const auto train = [&](const std::string& dir, const std::vector<std::string>& options) {
    std::vector<std::string> args = options;
    const fs::path to = folder.path() / dir;
    args.insert(args.end(),
                {"train", "-c", world.yaml.string(), "--set", "train.steps=1", "--set", "train.eval_every=0", "--set",
                 "run.dir=" + to.string(), "--set", "model.cpu_path=portable"});
    const auto r = run_moegraft(args);
    EXPECT_EQ(r.code, 0) << r.err;
    return run::read_run_record(to).sessions.back().environment.at("cpu_path");
  };
  EXPECT_EQ(train("key", {}), "portable");
  const auto best = io::Json::parse(run_moegraft({"inspect", world.base.string(), "--json"}).out)
                        .at("cpu")
                        .at("best_path")
                        .get<std::string>();
  EXPECT_EQ(train("option", {"--cpu-path", "auto"}), best) << "an option goes before the key";
}

TEST(Configs, EveryShippedRunParses) {
  int runs = 0;
  for (const auto& entry : fs::recursive_directory_iterator(kConfigs)) {
    const std::string name = entry.path().filename().string();
    if (entry.path().extension() != ".yaml" || name == "codec.yaml" || name == "eval.yaml") continue;
    EXPECT_NO_THROW(config::parse<run::RunConfig>(config::Document::from_file(entry.path().string()))) << entry.path();
    ++runs;
  }
  EXPECT_GE(runs, 7);
}

TEST_F(Command, DataCheckShowsDocumentsAsTheyRead) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  const auto r = run_moegraft(
      {"data", "check", world.image_shards.string(), "--show", "2", "--tokenizer", world.tokenizer.string(), "--json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const auto first = io::Json::parse(io::read_file(world.manifest).substr(0, io::read_file(world.manifest).find('\n')));
  EXPECT_EQ(r.out.find("0\t" + first.at("text").get<std::string>() + "<image: "), 0u) << r.out;
  EXPECT_EQ(std::count(r.out.begin(), r.out.end(), '\n'), 3) << r.out;
  EXPECT_EQ(run_moegraft({"data", "check", world.image_shards.string(), "--show", "2"}).code, 2);
  const auto other = run_moegraft({"data", "check", world.image_shards.string(), "--show", "2", "--tokenizer",
                                   (fs::path(test_source_dir()) / "tests/golden/model/qwen3").string()});
  EXPECT_NE(other.code, 0);
}

TEST_F(Command, DocsConfigIsWhatConfigPrints) {
  const auto r = run_moegraft({"config"});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.out, io::read_file(fs::path(test_source_dir()) / "docs/config.md"))
      << "renew it: moegraft config > docs/config.md";
  for (const char* key :
       {"| `run.dir` |", "| `data.train[].sample_by` |", "| `retrieval[].manifest` |", "| `codec.image_size` |"})
    EXPECT_NE(r.out.find(key), std::string::npos) << key;
}

TEST_F(Command, ConfigTemplatesHoldTheDefaults) {
  const auto print = [](const std::string& command) {
    const auto r = run_moegraft({"config", command, "--format", "yaml"});
    EXPECT_EQ(r.code, 0) << r.err;
    return r.out;
  };
  const auto check = [&]<class Config>(const std::string& command, const std::vector<std::string>& required, Config) {
    const auto read = [&](const std::string& yaml) {
      return config::dump(config::parse<Config>(config::Document::from_string(yaml, required)));
    };
    EXPECT_EQ(read(print(command)), read("{}")) << command;
  };
  check("train", {"run.dir=r", "model.path=m", "modalities.image.codec=c", "data.train=[{path: d}]"}, run::RunConfig());
  check("eval", {}, evaluate::EvalConfig());
  check("codec", {"dir=c", "data.train=[{path: d}]"}, codec::CodecRunConfig());
  EXPECT_EQ(run_moegraft({"config", "--format", "yaml"}).code, 2);
  EXPECT_EQ(run_moegraft({"config", "trian"}).code, 2);
}

TEST_F(Command, DataDealSaysHowEvenlyStepsAreShared) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  const auto r =
      run_moegraft({"data", "deal", "-c", world.yaml.string(), "--world", "2", "4", "--steps", "6", "--json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const io::Json j = io::Json::parse(r.out);
  ASSERT_EQ(j.at("results").size(), 4u);
  for (const auto& result : j.at("results")) {
    EXPECT_EQ(result.at("steps"), 6);
    EXPECT_GE(result.at("cost").at("mean").get<double>(), 1.0);
    if (result.at("batching") == "modality") { EXPECT_EQ(result.at("combinations_per_step"), 1.0); }
  }
  EXPECT_EQ(run_moegraft({"data", "deal", "-c", world.yaml.string(), "--world", "0"}).code, 2);
}

const char* const kQwen30B =
    R"({"model_type":"qwen3_moe","vocab_size":151936,"hidden_size":2048,"num_hidden_layers":48,"num_attention_heads":32,"num_key_value_heads":4,"head_dim":128,
       "intermediate_size":6144,"moe_intermediate_size":768,"num_experts":128,"num_experts_per_tok":8,"norm_topk_prob":true,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
       "max_position_embeddings":40960,"mlp_only_layers":[],"decoder_sparse_step":1})";

// A dry run of the recipes on the published sizes: nothing but config.json is needed.
TEST_F(Command, RecipesForPublicCheckpointsTrainAFewPercent) {
  struct Case {
    const char *config, *json;
    double billions, active;
  };
  const std::vector<Case> cases{
      {"qwen3-30b-a3b", kQwen30B, 30.5, 3.3},
      {"cluster/qwen3-30b-a3b", kQwen30B, 30.5, 3.3},
      {"olmoe-1b-7b",
       R"({"model_type":"olmoe","vocab_size":50304,"hidden_size":2048,"num_hidden_layers":16,"num_attention_heads":16,"num_key_value_heads":16,"intermediate_size":1024,
       "num_experts":64,"num_experts_per_tok":8,"rope_theta":10000.0,"max_position_embeddings":4096})",
       6.9, 1.3},
      {"mixtral-8x7b",
       R"({"model_type":"mixtral","vocab_size":32000,"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336,
       "num_local_experts":8,"num_experts_per_tok":2,"rope_theta":1000000.0,"max_position_embeddings":32768})",
       46.7, 12.9}};
  for (const auto& c : cases) {
    testing::TemporaryFolder folder;
    io::write_file_atomic(folder / "config.json", c.json);
    const auto r = run_moegraft({"inspect", "-c", (kConfigs / (std::string(c.config) + ".yaml")).string(), "--set",
                                 "model.path=" + folder.path().string(), "--codebook", "16384", "--json", "--set",
                                 "ot.max_iterations=1"});  // which is timed
    ASSERT_EQ(r.code, 0) << r.err;
    const io::Json j = io::Json::parse(r.out);
    EXPECT_NEAR(j["model"]["parameters"].get<double>() / 1e9, c.billions, 0.05) << c.config;
    EXPECT_NEAR(j["model"]["active_parameters"].get<double>() / 1e9, c.active, 0.1) << c.config;
    EXPECT_LE(j["trained"]["share_percent"].get<double>(), 5.0) << c.config;
    // The plan: the base at least once, and recomputation under a budget between the free total and the smallest one.
    const auto& memory = j["memory"];
    EXPECT_GT(memory["total_bytes"].get<double>(), 2e9 * c.billions) << c.config;
    EXPECT_EQ(memory["recompute_layers"], 0) << c.config;
    const double between =
        (memory["total_bytes"].get<double>() + memory["smallest_total_bytes"].get<double>()) / 2 / double(1 << 30);
    const auto tight =
        run_moegraft({"inspect", "-c", (kConfigs / (std::string(c.config) + ".yaml")).string(), "--set",
                      "model.path=" + folder.path().string(), "--codebook", "16384", "--json", "--set",
                      "train.memory_budget_gib=" + std::to_string(between), "--set", "ot.max_iterations=1"});
    ASSERT_EQ(tight.code, 0) << tight.err;
    const io::Json planned = io::Json::parse(tight.out)["memory"];
    EXPECT_GT(planned["recompute_layers"], 0) << c.config;
    EXPECT_TRUE(planned["fits"].get<bool>()) << c.config;
    EXPECT_GT(j["trained"]["share_percent"].get<double>(), 0.1) << c.config;
  }
}

// What fits one card, as configs/qwen3-30b-a3b.yaml says.
TEST_F(Command, TheRecipeOf30BParametersFitsItsCards) {
  testing::TemporaryFolder folder;
  io::write_file_atomic(folder / "config.json", kQwen30B);
  const auto inspect = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"inspect", "-c", (kConfigs / "qwen3-30b-a3b.yaml").string(), "--codebook", "16384",
                               "--device", "cuda", "--json", "--set", "model.path=" + folder.path().string()});
    const auto r = run_moegraft(more);
    EXPECT_EQ(r.code, 0) << r.err;
    return r.code == 0 ? io::Json::parse(r.out) : io::Json::object();
  };
  const double gib = double(1 << 30);
  const io::Json large = inspect({"--budget", "131"});  // of an H200
  EXPECT_TRUE(large["memory"]["fits"].get<bool>());
  EXPECT_LE(large["memory"]["recompute_layers"].get<int64_t>(), 4);
  EXPECT_EQ(large["calibration"]["solves"], 2 * 48 * 128);
  EXPECT_EQ(large["calibration"]["rows_per_expert"], 62);
  EXPECT_LE(large["calibration"]["host_bytes"].get<double>(), 4 * gib);
  EXPECT_GT(large["calibration"]["solve_seconds"].get<double>(), 0);
  const std::vector<std::string> small{"--set", "train.optimizer=adamw_8bit", "--set", "train.gradients=bf16",
                                       "--set", "train.accumulation=32",      "--set", "data.sequence_length=1024"};
  EXPECT_LE(inspect(small)["memory"]["smallest_total_bytes"].get<double>(), 72e9);
  EXPECT_LE(inspect({small.begin(), small.begin() + 4})["memory"]["smallest_total_bytes"].get<double>(), 73 * gib)
      << "in whole micro-batches it still fits a card of 80 GB";
  const auto kept = inspect({small[0], small[1]})["memory"]["gradient_bytes"].get<int64_t>();
  EXPECT_EQ(inspect({small.begin(), small.begin() + 4})["memory"]["gradient_bytes"].get<int64_t>(), kept / 2);
}

// For a card that is not here.
TEST_F(Command, InspectPlansForAGpuThatIsElsewhere) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  const auto memory = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"inspect", "-c", world.yaml.string(), "--json"});
    const auto r = run_moegraft(more);
    EXPECT_EQ(r.code, 0) << r.err;
    return r.code == 0 ? io::Json::parse(r.out)["memory"] : io::Json::object();
  };
  const io::Json here = memory({"--device", "cpu"}), there = memory({"--device", "cuda"}),
                 budgeted = memory({"--device", "cuda", "--budget", "80"});
  EXPECT_EQ(here["device"], "cpu");
  EXPECT_FALSE(here.contains("budget_bytes"));
  EXPECT_EQ(there["device"], "cuda");
  EXPECT_EQ(budgeted["budget_bytes"], int64_t{80} << 30);
  EXPECT_EQ(budgeted["total_bytes"], there["total_bytes"]);
  if (!torch::cuda::is_available()) {
    EXPECT_FALSE(there.contains("budget_bytes"));
    EXPECT_NE(there["budget"].get<std::string>().find("not known"), std::string::npos);
  }
  EXPECT_EQ(run_moegraft({"inspect", world.base.string(), "--budget", "80"}).code, 2);
  EXPECT_EQ(run_moegraft({"inspect", "-c", world.yaml.string(), "--budget", "0"}).code, 2);
}

TEST_F(Command, LaunchTakesACommandWithItsOptions) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  for (const std::vector<std::string>& own :
       {std::vector<std::string>{"--nproc", "1"}, {"--nproc=1", "--max-restarts", "0"}})
    for (const bool separated : {true, false}) {
      std::vector<std::string> argv{"launch"};
      argv.insert(argv.end(), own.begin(), own.end());
      if (separated) argv.push_back("--");
      argv.insert(argv.end(), {"inspect", "-c", world.yaml.string(), "--json"});
      const auto r = run_moegraft(argv);
      EXPECT_EQ(r.code, 0) << r.err;
      EXPECT_TRUE(r.out.starts_with("{")) << r.out;
    }
}

TEST_F(Command, LogitsOfIdsOnTheCommandLineAreThoseOfTheFile) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  io::save_safetensors(folder / "ids.safetensors", {{"input_ids", at::tensor({3, 14, 15}, at::kLong).unsqueeze(0)}});
  const auto logits = [&](const std::string& ids) {
    const auto r =
        run_moegraft({"logits", world.base.string(), "--ids", ids, "-o", (folder / "logits.safetensors").string()});
    EXPECT_EQ(r.code, 0) << r.err;
    return io::load_safetensors(folder / "logits.safetensors").at("logits").clone();
  };
  const at::Tensor expected = logits((folder / "ids.safetensors").string());
  for (const char* ids : {"3,14,15", "3 14 15", "3, 14, 15"}) EXPECT_TRUE(logits(ids).equal(expected)) << ids;

  std::string many = "3";  // longer than a file's name may be
  for (int i = 0; i < 200; ++i) many += ",14";
  EXPECT_EQ(logits(many).size(1), 201);
  logits("3,14,15");

  // Against a file whose logits were moved a little, with columns that the model has not.
  at::Tensor moved = at::cat({expected, at::ones({1, 3, 2})}, 2);
  moved[0][1][7] += 0.5;
  io::save_safetensors(folder / "moved.safetensors", {{"logits", moved}});
  for (const auto& [file, difference] : {std::pair("logits.safetensors", 0.0), std::pair("moved.safetensors", 0.5)}) {
    const auto r = run_moegraft(
        {"logits", world.base.string(), "--ids", "3,14,15", "--against", (folder / file).string(), "--json"});
    ASSERT_EQ(r.code, 0) << r.err;
    const io::Json j = io::Json::parse(r.out);
    EXPECT_NEAR(j["max_abs_difference"].get<double>(), difference, 1e-5);
    EXPECT_EQ(j["equal_bits"], difference == 0);
    EXPECT_EQ(j["positions"], 3);
    EXPECT_EQ(r.err.find("the vocabularies have") != std::string::npos, difference > 0) << r.err;
  }
  EXPECT_EQ(run_moegraft(
                {"logits", world.base.string(), "--ids", "3,14", "--against", (folder / "logits.safetensors").string()})
                .code,
            1);
  EXPECT_EQ(run_moegraft({"logits", world.base.string(), "--ids", "3,14"}).code, 2);
  const auto others = run_moegraft(
      {"logits", world.base.string(), "--ids", "3,15,14", "--against", (folder / "logits.safetensors").string()});
  EXPECT_EQ(others.code, 1);
  EXPECT_NE(others.err.find("its logits are of other ids"), std::string::npos) << others.err;
}

TEST_F(Command, BenchStepEqualsThePlainLoss) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  const at::Tensor ids = at::arange(3, 43).view({2, 20});
  io::save_safetensors(folder / "ids.safetensors", {{"input_ids", ids}});
  const auto logits = run_moegraft({"logits", world.base.string(), "--ids", (folder / "ids.safetensors").string(), "-o",
                                    (folder / "logits.safetensors").string()});
  ASSERT_EQ(logits.code, 0) << logits.err;
  const at::Tensor l = io::load_safetensors(folder / "logits.safetensors").at("logits");
  const double expected =
      at::cross_entropy_loss(l.narrow(1, 0, 19).reshape({38, -1}), ids.narrow(1, 1, 19).reshape({-1})).item<double>();
  const auto bench = run_moegraft({"bench", world.base.string(), "--dtype", "float32", "--rank", "4", "--steps", "2",
                                   "--ids", (folder / "ids.safetensors").string(), "--json"});
  ASSERT_EQ(bench.code, 0) << bench.err;
  const io::Json j = io::Json::parse(bench.out);
  EXPECT_NEAR(j["loss"][0].get<double>(), expected, 1e-4);
  EXPECT_NE(j["loss"][0], j["loss"][1]) << "the step must train";
  for (const char* key : {"tokens_per_s", "step_s", "peak_mib", "matmul_gflops"}) EXPECT_TRUE(j.contains(key)) << key;
}

TEST_F(Command, UsageErrorsExitWithTwoAndFailuresWithOne) {
  EXPECT_EQ(run_moegraft({}).code, 2);
  EXPECT_EQ(run_moegraft({"fly"}).code, 2);
  EXPECT_EQ(run_moegraft({"--help"}).code, 0);
  EXPECT_EQ(run_moegraft({"logits", "/nowhere", "--ids", "x", "-o", "y"}).code, 1);
  EXPECT_EQ(run_moegraft({"logits", "/nowhere", "--ids", "x", "-o", "y", "--gate", "half"}).code, 2);
  EXPECT_EQ(run_moegraft({"logits", "/nowhere", "--ids", "x", "-o", "y", "--dtype", "int8"}).code, 2);
  testing::TemporaryFolder folder;
  EXPECT_EQ(run_moegraft({"inspect", folder.path().string()}).code, 1);
}

TEST_F(Command, AnIdOutsideTheVocabularyIsOneClearLine) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  io::save_safetensors(folder / "ids.safetensors", {{"input_ids", at::full({1, 3}, 1000000, at::kLong)}});
  const auto r = run_moegraft({"logits", world.base.string(), "--ids", (folder / "ids.safetensors").string(), "-o",
                               (folder / "out.safetensors").string()});
  EXPECT_EQ(r.code, 1);
  EXPECT_NE(r.err.find("token id 1000000 is outside the vocabulary"), std::string::npos) << r.err;
  EXPECT_FALSE(fs::exists(folder / "out.safetensors"));
}

TEST_F(Command, TheSummaryPutsBaselinesBesideRetrieval) {
  testing::TemporaryFolder folder;
  const auto top = [](double top1, double top10) { return io::Json{{"top1", top1}, {"top10", top10}}; };
  io::Json eval{{"sections", {{"retrieval.heldout", "0123456789abcdef"}}}, {"text", {{"perplexity", 50.25}}}};
  eval["retrieval"]["heldout"] = top(0.1, 0.3), eval["retrieval"]["heldout"]["chance"] = top(0.001, 0.01);
  eval["baselines"]["tasks"]["heldout"]["bag_of_words"] = top(0.184, 0.502);
  eval["ranking"]["heldout"] = {{"caption_to_image_pmi", top(0.5, 1)}, {"chance", top(0.015625, 0.15625)}};
  eval["ranking"]["templates"]["image_to_caption"] = top(0.25, 0.75);
  io::write_json(folder / "eval.json", eval);
  io::write_file_atomic(folder / "stages.tsv", "graft\t660\n");
  fs::create_directories(folder / "inits/random");
  io::write_file_atomic(
      folder / "inits/random/metrics.jsonl",
      R"({"epochs":0.5,"grad_norm":1.0,"loss":5.0,"lr_factor":1.0,"nll_image":5.0,"nll_text":4.0,"seconds":1.0,"step":100,"tokens":64,"tokens_per_s":64.0})"
      "\n"
      R"({"epochs":1.0,"grad_norm":1.0,"loss":4.0,"lr_factor":1.0,"nll_image":4.266543961109941,"seconds":2.0,"step":150,"tokens":96,"tokens_per_s":64.0})"
      "\n"
      R"({"eval":true,"eval_nll_image":3.6360480555236108,"eval_nll_text":2.0,"step":150})"
      "\n");
  const auto r = run_moegraft({"summary", folder.path().string()});
  ASSERT_EQ(r.code, 0) << r.err;
  const auto cells = [&](const std::string& name) {  // of the row that begins with it
    std::string cells = r.out.substr(r.out.find("\n" + name + " ") + 1);
    cells.resize(cells.find('\n'));
    return std::regex_replace(cells, std::regex(" +"), " ");
  };
  EXPECT_EQ(cells("heldout"), "heldout 10.0 / 30.0 18.4 / 50.2 - 0.1 / 1.0 - - 50.0 / 100.0 1.6 / 15.6");
  EXPECT_EQ(cells("templates"), "templates - - - - 25.0 / 75.0 - - -");
  EXPECT_EQ(cells("eval.text.perplexity"), "eval.text.perplexity 50.25");
  EXPECT_EQ(r.out.find("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(cells("initialisations.random_eval_nll_image"), "initialisations.random_eval_nll_image 3.636");
  const auto summary = io::read_json(folder / "summary.json");
  EXPECT_EQ(summary["eval"], eval);
  EXPECT_EQ(summary["initialisations"],
            (io::Json{{"random_nll_image", 4.266543961109941}, {"random_eval_nll_image", 3.6360480555236108}}));
}

// An interrupted disk: a file-size limit stands for a full one.
TEST_F(Command, AFullDiskDuringASaveLosesNothing) {
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder.path());
  ASSERT_EQ(run_moegraft({"train", "-c", world.yaml.string(), "--set", "train.steps=2", "--set", "checkpoint.every=1",
                          "--set", "train.eval_every=0"})
                .code,
            0);
  const auto before = testing::read_parameters(world.run);
  testing::Process full({"/bin/bash", "-c",
                         "ulimit -f 8; exec \"$0\" train -c \"$1\" --set train.steps=4 --set checkpoint.every=1 --set "
                         "train.eval_every=0 --resume auto",
                         testing::moegraft_binary().string(), world.yaml.string()});
  const auto r = full.wait();
  EXPECT_EQ(r.code, 1) << r.err;
  EXPECT_EQ(r.signal, 0);
  const auto after = testing::read_parameters(world.run);
  for (const auto& [name, tensor] : before) EXPECT_TRUE(at::equal(tensor, after.at(name))) << name;
  EXPECT_EQ(run_moegraft({"train", "-c", world.yaml.string(), "--set", "train.steps=4", "--set", "checkpoint.every=1",
                          "--set", "train.eval_every=0", "--resume", "auto"})
                .code,
            0);
}

}  // namespace
}  // namespace moegraft
