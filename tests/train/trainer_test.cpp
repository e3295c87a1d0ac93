// The loop end to end, in process and through the binary: what trains, exact resume, kills, signals, bad input.
#include <gtest/gtest.h>

#include <csignal>
#include <fstream>
#include <thread>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/data/shard.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/run/signals.h"
#include "moegraft/train/trainer.h"
#include "support/metrics.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::make_tiny_world;
using moegraft::testing::TemporaryFolder;
using moegraft::testing::TinyWorld;

std::string adapter_bytes(const fs::path& run) {
  const auto latest = checkpoint::find_latest(run / "checkpoints");
  return latest ? io::read_file(*latest / "adapter.safetensors") : "";
}

std::map<int64_t, double> losses(const fs::path& run) { return moegraft::testing::training_column(run, "loss"); }

run::RunConfig config_of(const TinyWorld& world, const std::string& dir, int64_t steps) {
  run::RunConfig c = world.config;
  c.run.dir = (world.dir / dir).string();
  c.train.steps = steps;
  c.train.log_every = 1;
  c.train.warmup = 2;
  c.checkpoint.every = 2;
  c.checkpoint.keep = 100;
  return c;
}

// As after a conversion that cost text ability: the whole base goes on from its own weights.
TEST(Trainer, ABaseOfADirectoryTrainsFromItsWeights) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  for (const double lr : {0.0, 1e-2}) {
    run::RunConfig c = config_of(world, "thawed" + std::to_string(lr > 0), 12);
    c.modalities.clear(), c.adapters.clear();
    c.train.base_weights = BaseWeights::full, c.train.allow_text_drift = true;
    c.train.base = {lr, 0.0};
    c.train.sample_every = 0, c.train.sample_prompts.clear();
    c.data.train = {{world.text_shards.string(), 1.0}}, c.data.eval.clear();
    EXPECT_FALSE(train(c).stopped);
    const auto before = io::load_safetensors(world.base / "model.safetensors"),
               after = io::load_safetensors(fs::path(c.run.dir) / "model/model.safetensors");
    ASSERT_EQ(before.size(), after.size());
    for (const auto& [name, value] : before) EXPECT_EQ(after.at(name).equal(value), lr == 0) << name;
    const auto l = losses(c.run.dir);
    if (lr > 0) EXPECT_LT(l.rbegin()->second, l.begin()->second);
  }
}

TEST(Trainer, LearnsThePicturesAndLeavesTheBaseAlone) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "learn", 40);
  c.train.lora.lr = 1e-2;
  c.train.embeddings.lr = 3e-2;
  const std::string base_before = io::read_file(world.base / "model.safetensors");
  EXPECT_FALSE(train(c).stopped);
  const auto l = losses(c.run.dir);
  ASSERT_EQ(l.size(), 40u);
  EXPECT_LT(l.rbegin()->second, 0.7 * l.begin()->second);
  EXPECT_EQ(io::read_file(world.base / "model.safetensors"), base_before);
  for (const char* name : {"config.yaml", "run.json", "metrics.jsonl", "routing.jsonl", "vocabulary.json", "init.json"})
    EXPECT_TRUE(fs::exists(fs::path(c.run.dir) / name)) << name;
}

TEST(Trainer, AResumedRunIsBitIdenticalToAnUninterruptedOne) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  for (const int64_t accumulation : {1, 2}) {
    run::RunConfig whole = config_of(world, "whole" + std::to_string(accumulation), 8),
                   part = config_of(world, "part" + std::to_string(accumulation), 8);
    for (auto* c : {&whole, &part})
      c->train.accumulation = accumulation, c->data.caption_dropout = 0.3,
      c->data.sequence_length = c->data.tokens_per_step / accumulation;
    train(whole);
    train(part);
    // As if killed after step 5: what step 4 saved is all there is.
    for (const int64_t step : {6, 8})
      fs::remove_all(fs::path(part.run.dir) / "checkpoints" / checkpoint::step_name(step));
    train(part, "auto");
    EXPECT_EQ(adapter_bytes(whole.run.dir), adapter_bytes(part.run.dir));
    EXPECT_EQ(losses(whole.run.dir), losses(part.run.dir));
    const auto a = checkpoint::load(*checkpoint::find_latest(fs::path(whole.run.dir) / "checkpoints")),
               b = checkpoint::load(*checkpoint::find_latest(fs::path(part.run.dir) / "checkpoints"));
    for (const auto& [name, tensor] : a.optimizer) EXPECT_TRUE(at::equal(tensor, b.optimizer.at(name))) << name;
  }
}

TEST(Trainer, ACacheOfCaptionsChangesNoBitOfAResumedRun) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig whole = config_of(world, "whole", 12), part = config_of(world, "part", 12),
                 small = config_of(world, "small", 12), off = config_of(world, "off", 12);
  for (auto* c : {&whole, &part}) c->train.prefix_cache_mib = 64;
  small.train.prefix_cache_mib = 1;
  train(whole);
  train(part);
  for (const int64_t step : {6, 8, 10, 12})
    fs::remove_all(fs::path(part.run.dir) / "checkpoints" / checkpoint::step_name(step));
  train(part, "auto");  // with an empty cache
  EXPECT_EQ(adapter_bytes(whole.run.dir), adapter_bytes(part.run.dir));
  EXPECT_EQ(losses(whole.run.dir), losses(part.run.dir));
  train(small);
  EXPECT_EQ(adapter_bytes(whole.run.dir), adapter_bytes(small.run.dir));
  train(off);
  const auto with = losses(whole.run.dir), without = losses(off.run.dir);
  for (const auto& [step, loss] : with) EXPECT_NEAR(loss, without.at(step), 1e-4) << step;
  double found = 0;
  for (const auto& line : moegraft::testing::metrics_of(whole.run.dir).training)
    found = std::max(found, line.prefix_cache_hit_share.value_or(0));
  EXPECT_GT(found, 0.5);  // captions came back
}

TEST(Trainer, PrefetchingChangesNothingButTheWait) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  std::string expected;
  for (const int64_t depth : {0, 1, 6}) {
    run::RunConfig c = config_of(world, "ahead" + std::to_string(depth), 6);
    c.train.accumulation = 2, c.data.sequence_length = c.data.tokens_per_step / 2, c.data.caption_dropout = 0.3;
    c.data.prefetch = depth;
    train(c);
    // From the middle, with another depth.
    for (const int64_t step : {4, 6}) fs::remove_all(fs::path(c.run.dir) / "checkpoints" / checkpoint::step_name(step));
    c.data.prefetch = 3;
    train(c, "auto");
    if (depth == 0) expected = adapter_bytes(c.run.dir);
    EXPECT_EQ(adapter_bytes(c.run.dir), expected) << "depth " << depth;
    for (const auto& line : moegraft::testing::metrics_of(c.run.dir).training) {
      const double share = line.data_wait_share.value();
      EXPECT_TRUE(share > 0 && share < 1)
          << share << " at step " << line.step;  // no batch takes no time, no step is all waiting
      EXPECT_TRUE(line.truncated_documents && line.skipped_documents) << "step " << line.step;
    }
  }
}

TEST(Trainer, ABatchWithoutPicturesTrainsNothingAndBreaksNothing) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "text", 3);
  c.data.train = {{world.text_shards.string(), 1.0}};
  c.data.eval.clear();
  c.train.eval_every = 0;
  train(c);
  const auto first = checkpoint::load(fs::path(c.run.dir) / "checkpoints" / checkpoint::step_name(0)),
             last = checkpoint::load(*checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints"));
  EXPECT_EQ(last.step, 3);
  for (const auto& [name, tensor] : first.parameters) EXPECT_TRUE(at::equal(tensor, last.parameters.at(name))) << name;
}

// Nothing is learnt at a learning rate of 0: the first evaluation stays the best one.
TEST(Trainer, EndsWhenTheHeldOutLossNoLongerFalls) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "early", 30);
  c.train.lora.lr = c.train.embeddings.lr = 0;
  c.train.eval_every = 2, c.train.early_stopping_patience = 3;
  EXPECT_EQ(train(c).step, 6);
  EXPECT_EQ(checkpoint::load(*checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints")).step, 6);
  EXPECT_EQ(train(c, "auto").step, 6);
  c.run.dir = (world.dir / "learns").string();
  c.train.lora.lr = c.train.embeddings.lr = 1e-2;
  EXPECT_EQ(train(c).step, 30);
}

TEST(Trainer, Bfloat16KeepsFloat32Masters) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig wide = config_of(world, "float32", 10);
  wide.train.lora.lr = 1e-2;
  run::RunConfig c = wide;
  c.run.dir = (world.dir / "bf16").string();
  c.model.dtype = "bfloat16";
  train(wide);
  train(c);
  for (const auto& [step, loss] : losses(wide.run.dir))
    EXPECT_NEAR(loss, losses(c.run.dir)[step], 0.03 * loss) << "step " << step;
  for (const auto& [name, tensor] : moegraft::testing::read_parameters(c.run.dir))
    EXPECT_EQ(tensor.scalar_type(), at::kFloat) << name;
}

TEST(Trainer, InitFromStartsFromAnEarlierAdapter) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig first = config_of(world, "first", 4);
  train(first);
  run::RunConfig second = config_of(world, "second", 2);
  second.adapters[0].init_from = first.run.dir;
  train(second);
  const auto end = moegraft::testing::read_parameters(first.run.dir),
             start = checkpoint::load(fs::path(second.run.dir) / "checkpoints" / checkpoint::step_name(0)).parameters;
  for (const auto& [name, tensor] : end)
    if (name.starts_with("adapters.")) EXPECT_TRUE(at::equal(tensor, start.at(name))) << name;
  second.run.dir = (world.dir / "third").string();
  second.adapters[0].rank = 2;
  try {
    train(second);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("must have shape"), std::string::npos) << e.what();
  }
}

TEST(Trainer, ACorruptCheckpointFallsBackToThePreviousOne) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "corrupt", 6);
  train(c);
  const std::string expected = adapter_bytes(c.run.dir);
  const fs::path file = fs::path(c.run.dir) / "checkpoints" / checkpoint::step_name(6) / "adapter.safetensors";
  std::string bytes = io::read_file(file);
  bytes[bytes.size() - 1] ^= 1;
  std::ofstream(file, std::ios::binary) << bytes;
  train(c, "auto");
  EXPECT_EQ(adapter_bytes(c.run.dir), expected);
}

TEST(Trainer, RefusesASecondRunInOneDirectoryAndChangedKeys) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "twice", 2);
  train(c);
  EXPECT_THROW(train(c), UsageError);
  c.train.lora.lr *= 2;
  try {
    train(c, "auto");
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("train.lora.lr"), std::string::npos) << e.what();
  }
}

TEST(Trainer, ANumberThatIsNotFiniteStopsWithTheBatchSaved) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "nan", 50);
  c.train.lora.lr = 10;
  c.train.embeddings.lr = 10;
  c.train.clip = 0;
  c.train.warmup = 0;
  // Rows beyond float32's range after the first step: the squares in the norms overflow.
  train([&] {
    auto d = c;
    d.train.steps = 1;
    d.train.schedule = ScheduleKind::constant;
    return d;
  }());
  auto parameters = moegraft::testing::read_parameters(c.run.dir);
  for (auto& [name, tensor] : parameters) tensor = at::full_like(tensor, 1e30);
  moegraft::testing::replace_parameters(c.run.dir, parameters);
  c.train.schedule = ScheduleKind::constant;
  try {
    train(c, "auto");
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("the batch is saved in"), std::string::npos) << e.what();
  }
  bool found = false;
  for (const auto& entry : fs::directory_iterator(c.run.dir))
    found |= entry.path().filename().string().starts_with("bad-batch-step-");
  EXPECT_TRUE(found);
}

// Through the binary.
class Binary : public ::testing::Test {
 protected:
  void SetUp() override {
    if (moegraft::testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
  }
  static std::vector<std::string> command(const run::RunConfig& c, const TinyWorld& world, const std::string& resume) {
    return {moegraft::testing::moegraft_binary().string(),
            "train",
            "-c",
            world.yaml.string(),
            "--resume",
            resume,
            "--set",
            "run.dir=" + c.run.dir,
            "--set",
            "train.steps=" + std::to_string(c.train.steps),
            "--set",
            "train.log_every=1",
            "--set",
            "train.warmup=2",
            "--set",
            "checkpoint.every=" + std::to_string(c.checkpoint.every),
            "--set",
            "checkpoint.keep=3",
            "--set",
            "train.eval_every=0"};
  }
};

TEST_F(Binary, KilledAtRandomMomentsItEndsInTheSameBytes) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "calm", 60);
  c.checkpoint.every = 3;
  moegraft::testing::Process calm(command(c, world, "none"));
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(calm.wait().code, 0) << calm.errors();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::string expected = adapter_bytes(c.run.dir);
  const auto expected_losses = losses(c.run.dir);

  c.run.dir = (world.dir / "stormy").string();
  Rng rng(7, "kill");
  int kills = 0;
  for (int round = 0; round < 60; ++round) {
    moegraft::testing::Process p(command(c, world, "auto"));
    // Growing patience: every attempt may be killed anywhere, yet the run must end.
    const double patience = rng.uniform() * seconds * (0.3 + 0.1 * round);
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(patience);
    while (p.running() && std::chrono::steady_clock::now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    if (p.running()) {
      p.send(SIGKILL);
      p.wait();
      ++kills;
      continue;
    }
    const auto result = p.wait();
    ASSERT_EQ(result.code, 0) << result.err;
    break;
  }
  EXPECT_GT(kills, 0);
  EXPECT_EQ(adapter_bytes(c.run.dir), expected) << "after " << kills << " kills";
  EXPECT_EQ(losses(c.run.dir), expected_losses);
}

TEST_F(Binary, ASignalSavesAndExitsWithItsOwnCode) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  run::RunConfig c = config_of(world, "signal", 100000);
  c.checkpoint.every = 100000;
  moegraft::testing::Process p(command(c, world, "none"));
  for (int i = 0; i < 2000 && p.running() && losses(c.run.dir).size() < 3; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  p.send(SIGTERM);
  const auto result = p.wait();
  EXPECT_EQ(result.code, run::kExitStopped) << result.err;
  const auto latest = checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints");
  ASSERT_TRUE(latest);
  const auto saved = checkpoint::load(*latest);
  EXPECT_GE(saved.step, 3);
  EXPECT_EQ(losses(c.run.dir).rbegin()->first, saved.step) << "nothing trained is lost";
}

TEST_F(Binary, BadConfigsExitWithTwoAndOneLine) {
  TemporaryFolder folder;
  const TinyWorld world = make_tiny_world(folder.path());
  struct Case {
    std::string set, expected;
  };
  for (const auto& c : std::vector<Case>{{"train.step=3", "did you mean"},
                                         {"adapters[0].rank=0", "rank"},
                                         {"train.lora.lr=fast", "lr"},
                                         {"adapters[0].modality=[audio]", "audio"}}) {
    const auto r = moegraft::testing::run_moegraft({"train", "-c", world.yaml.string(), "--set", c.set});
    EXPECT_EQ(r.code, 2) << c.set;
    EXPECT_NE(r.err.find(c.expected), std::string::npos) << r.err;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  }
  const auto missing = moegraft::testing::run_moegraft({"train", "-c", "/nowhere.yaml"});
  EXPECT_EQ(missing.code, 2) << missing.err;
  const auto data =
      moegraft::testing::run_moegraft({"train", "-c", world.yaml.string(), "--set", "data.train[0].path=/nowhere"});
  EXPECT_EQ(data.code, 1) << data.err;
  EXPECT_NE(data.err.find("/nowhere"), std::string::npos);
}

}  // namespace
}  // namespace moegraft::train
