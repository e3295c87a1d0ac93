// The whole way for every family: graft, initialise, train, resume, measure text drift, generate.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/evaluate/drift.h"
#include "moegraft/generate/images.h"
#include "moegraft/io/files.h"
#include "moegraft/kernels/matrix.h"
#include "moegraft/model/families.h"
#include "moegraft/train/trainer.h"
#include "support/metrics.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::TemporaryFolder;
using moegraft::testing::TinyWorld;

class Families : public ::testing::TestWithParam<std::string> {};

TEST_P(Families, GraftTrainResumeAndGenerate) {
  const TemporaryFolder folder;
  const TinyWorld world = moegraft::testing::make_tiny_world(folder.path(), {GetParam()});
  const auto config_of = [&](const std::string& name, int64_t steps) {
    run::RunConfig c = world.config;
    c.run.dir = (folder / name).string();
    c.train.steps = steps, c.train.sample_prompts.clear();
    c.train.lora.lr = 3e-2, c.train.embeddings.lr = 3e-2;
    c.adapters[0].init = adapters::FactorInit::gw_subspace;
    c.ot.calibration_tokens = 512, c.ot.max_iterations = 5;
    c.checkpoint = {6, 10, true};
    return c;
  };
  const auto factors = [](const run::RunConfig& c) {
    return io::read_file(*checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints") / "adapter.safetensors");
  };
  const run::RunConfig whole = config_of("whole", 12);
  EXPECT_FALSE(train(whole).stopped);
  const auto losses = moegraft::testing::training_column(whole.run.dir, "loss");
  ASSERT_EQ(losses.size(), 12u);
  EXPECT_LT(losses.rbegin()->second, losses.begin()->second);

  // As if killed after step 6's checkpoint.
  const run::RunConfig parts = config_of("parts", 12);
  train(parts);
  fs::remove_all(fs::path(parts.run.dir) / "checkpoints" / checkpoint::step_name(12));
  train(parts, "auto");
  EXPECT_EQ(factors(parts), factors(whole));

  auto model = graft::open_model(whole.run.dir, {});
  const evaluate::Drift drift = evaluate::measure_drift(model, 1);
  EXPECT_TRUE(drift.exact());
  EXPECT_GT(drift.gate_open, 1e-4);  // the control: an open gate shows
  const auto images = generate::generate_images(model, std::vector<std::string>{"a red disc"}, {});
  ASSERT_FALSE(images.empty());
  EXPECT_TRUE(at::isfinite(images[0].pixels_3HW).all().item<bool>());
}

// The recipe of a small machine: base in 8 bits, trained, resumed, and opened in what the run says.
TEST(QuantisedBase, GraftTrainsResumesAndKeepsText) {
  const TemporaryFolder folder;
  for (const std::string family : {"qwen3_moe", "qwen2_moe"}) {
    const TinyWorld world = moegraft::testing::make_tiny_world(folder / family, {family});
    run::RunConfig c = world.config;
    c.model.quantize = model::Quantize::q8_0;
    c.adapters[0].init = adapters::FactorInit::gw_subspace;
    c.ot.calibration_tokens = 512, c.ot.max_iterations = 5;
    c.train.steps = 12, c.train.sample_prompts.clear();
    c.train.lora.lr = 3e-2, c.train.embeddings.lr = 3e-2;
    c.checkpoint = {6, 10, true};
    const auto factors = [&] {
      return io::read_file(*checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints") / "adapter.safetensors");
    };
    train(c);
    const std::string whole = factors();
    const auto losses = moegraft::testing::training_column(c.run.dir, "loss");
    EXPECT_LT(losses.rbegin()->second, losses.begin()->second);
    fs::remove_all(fs::path(c.run.dir) / "checkpoints" / checkpoint::step_name(12));
    train(c, "auto");
    EXPECT_EQ(factors(), whole);
    auto model = graft::open_model(c.run.dir, {});
    EXPECT_EQ(model.decoder->base().weights->head_VD().quantised(), kernels::quantised_products());
    const evaluate::Drift drift = evaluate::measure_drift(model, 1);
    EXPECT_TRUE(drift.exact());
    EXPECT_GT(drift.gate_open, 1e-4);
  }
}

// A second kind of adapter, the router's site and a base without experts go the same way.
TEST(Kinds, VeraTrainsResumesAndKeepsText) {
  const TemporaryFolder folder;
  for (const std::string family : {"qwen3_moe", "llama"}) {
    const TinyWorld world = moegraft::testing::make_tiny_world(folder / family, {family});
    run::RunConfig c = world.config;
    c.adapters[0].kind = adapters::AdapterKind::vera, c.adapters[0].rank = 8;
    if (family == "qwen3_moe") c.adapters[0].sites.emplace_back("router");
    c.train.steps = 40, c.train.sample_prompts.clear();
    c.train.lora.lr = 3e-2, c.train.embeddings.lr = 3e-2;
    c.checkpoint = {20, 10, true};
    const auto factors = [&] {
      return io::read_file(*checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints") / "adapter.safetensors");
    };
    train(c);
    const std::string whole = factors();
    const auto losses = moegraft::testing::training_column(c.run.dir, "loss");
    EXPECT_LT(losses.rbegin()->second, 0.8 * losses.begin()->second);
    fs::remove_all(fs::path(c.run.dir) / "checkpoints" / checkpoint::step_name(40));
    train(c, "auto");
    EXPECT_EQ(factors(), whole);
    auto model = graft::open_model(c.run.dir, {});
    const evaluate::Drift drift = evaluate::measure_drift(model, 1);
    EXPECT_TRUE(drift.exact());
    EXPECT_GT(drift.gate_open, 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Known, Families, ::testing::ValuesIn(model::known_families()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace moegraft::train
