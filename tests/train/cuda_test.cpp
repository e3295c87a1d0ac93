// Training on a GPU, through the binary: the CPU's losses and gradient norms, moments in float32 and in 8 bits,
// checkpoints written while it goes on, SIGKILL and the same bytes after resuming, text as it was. The bodies run on
// the CPU too, so that only the card is new to them; on a card nothing here has run yet.
#include <gtest/gtest.h>

#include <csignal>
#include <map>
#include <thread>

#include "libtorch.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/evaluate/drift.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "support/gpu.h"
#include "support/metrics.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using testing::Process;
using testing::TinyWorld;

constexpr double kClip = 0.05;

class Training {
 public:
  Training() : world_(testing::make_tiny_world(folder_.path())) {}

  run::RunConfig config(const std::string& name, const std::string& device, const std::string& dtype,
                        OptimizerKind optimizer, int64_t steps) const {
    run::RunConfig c = world_.config;
    c.run.dir = (world_.dir / name).string();
    c.model.device = config::parse_choice<config::Device>("device", device), c.model.dtype = dtype;
    c.adapters[0].rank = 64;  // as large as 8 bits ask for
    c.data.sequence_length = 64, c.data.tokens_per_step = 128;
    auto& t = c.train;
    t.optimizer = optimizer, t.steps = steps, t.accumulation = 2, t.clip = kClip, t.log_every = 1;
    t.sample_prompts.clear(), t.sample_every = 0;
    c.checkpoint.every = 2, c.checkpoint.keep = 100, c.checkpoint.async = true;
    return c;
  }

  Process start(const run::RunConfig& c, const std::string& resume) const {
    const fs::path yaml = c.run.dir + ".yaml";
    io::write_file_atomic(yaml, config::dump(c));
    return Process({testing::moegraft_binary().string(), "train", "-c", yaml.string(), "--resume", resume});
  }
  void train(const run::RunConfig& c, const std::string& resume = "none") const {
    const auto result = start(c, resume).wait();
    ASSERT_EQ(result.code, 0) << result.err;
  }

 private:
  testing::TemporaryFolder folder_{"moegraft-cuda-train"};
  TinyWorld world_;
};

fs::path last(const run::RunConfig& c) { return *checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints"); }

// In float32, where the two differ by the order of sums alone. Each step's loss stands on the updates before it.
void expect_the_cpus_numbers(const std::string& device) {
  const Training training;
  const auto there = training.config("there", device, "float32", OptimizerKind::adamw, 6),
             here = training.config("here", "cpu", "float32", OptimizerKind::adamw, 6);
  training.train(there);
  training.train(here);
  for (const char* key : {"loss", "grad_norm"}) {
    const auto a = testing::training_column(there.run.dir, key), b = testing::training_column(here.run.dir, key);
    ASSERT_EQ(a.size(), 6u);
    // Adam divides by the root of the moments: where a gradient is mostly rounding, so is its update; each of a tenth
    // of lr at most moves the loss by less.
    for (const auto& [step, value] : b)
      EXPECT_NEAR(a.at(step), value, (step == 1 ? 1e-5 : 1e-3) * value) << key << " of step " << step;
    if (std::string(key) == "grad_norm")
      for (const auto& [step, value] : b) EXPECT_GT(value, kClip) << "clipping must act in step " << step;
  }
}

// Killed once its second checkpoint is there, while others are being written; then resumed to the end.
void expect_the_same_bytes_after_a_kill(const std::string& device, OptimizerKind optimizer) {
  const Training training;
  const auto calm = training.config("calm", device, "bfloat16", optimizer, 40),
             killed = training.config("killed", device, "bfloat16", optimizer, 40);
  training.train(calm);
  {
    Process p = training.start(killed, "none");
    while (p.running() && checkpoint::list_checkpoints(fs::path(killed.run.dir) / "checkpoints").size() < 3)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    ASSERT_TRUE(p.running()) << "it ended before it could be killed: " << p.wait().err;
    p.send(SIGKILL);
    EXPECT_EQ(p.wait().signal, SIGKILL);
  }
  const auto begun = testing::training_column(killed.run.dir, "loss");
  ASSERT_LT(begun.empty() ? 0 : begun.rbegin()->first, 40) << "nothing was left to resume";
  training.train(killed, "auto");
  for (const char* file : {"adapter.safetensors", "optimizer.safetensors"})
    EXPECT_TRUE(io::read_file(last(calm) / file) == io::read_file(last(killed) / file)) << file;
  EXPECT_EQ(testing::training_column(calm.run.dir, "loss"), testing::training_column(killed.run.dir, "loss"));
  EXPECT_EQ(testing::training_column(calm.run.dir, "grad_norm"), testing::training_column(killed.run.dir, "grad_norm"));
  int64_t in_8bit = 0;
  for (const auto& [name, tensor] : checkpoint::load(last(calm)).optimizer) in_8bit += name.ends_with(".exp_avg.codes");
  EXPECT_EQ(in_8bit > 0, optimizer == OptimizerKind::adamw_8bit);
  const auto losses = testing::training_column(calm.run.dir, "loss");
  EXPECT_LT(losses.rbegin()->second, losses.begin()->second);

  // C1: what was trained there leaves text alone there, to the bit.
  graft::OpenOptions options;
  options.device = config::parse_choice<config::Device>("device", device);
  graft::GraftedModel model = graft::open_model(calm.run.dir, options);
  const evaluate::Drift drift = evaluate::measure_drift(model, 5);
  EXPECT_TRUE(drift.exact()) << "text drift " << drift.max_abs();
  EXPECT_GT(drift.gate_open, 0);
}

class CudaTraining : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::moegraft_binary().empty()) GTEST_SKIP() << "the moegraft binary is not built";
  }
};

TEST_F(CudaTraining, Float32HasTheCpusLossesAndGradientNorms) {
  MOEGRAFT_NEEDS_GPU();
  expect_the_cpus_numbers("cuda");
}
TEST_F(CudaTraining, KilledAndResumedItEndsInTheSameBytes) {
  MOEGRAFT_NEEDS_GPU();
  expect_the_same_bytes_after_a_kill("cuda", OptimizerKind::adamw);
}
TEST_F(CudaTraining, WithMomentsIn8BitsToo) {
  MOEGRAFT_NEEDS_GPU();
  expect_the_same_bytes_after_a_kill("cuda", OptimizerKind::adamw_8bit);
}

using CudaTrainingOnTheHost = CudaTraining;
TEST_F(CudaTrainingOnTheHost, Bodies) {
  expect_the_cpus_numbers("cpu");
  expect_the_same_bytes_after_a_kill("cpu", OptimizerKind::adamw_8bit);
}

}  // namespace
}  // namespace moegraft::train
