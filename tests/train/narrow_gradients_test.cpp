// train.gradients: bf16. What is kept, and runs with it: near those with float32 gradients, resumed bit for bit, the
// same in every layout, and counted by the plan.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/parallel/narrow_gradients.h"
#include "moegraft/planning/memory.h"
#include "moegraft/train/optimizer.h"
#include "moegraft/train/trainer.h"
#include "support/metrics.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::TemporaryFolder;

at::Tensor leaf(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::make_generator<at::CPUGeneratorImpl>(seed), at::kFloat).requires_grad_(true);
}

TEST(NarrowGradients, AreRoundedOnceForEachMicroBatch) {
  model::ParameterRegistry registry;
  const at::Tensor x = leaf({5, 7}, 1), frozen = leaf({3}, 4), a = leaf({5, 7}, 2).detach(),
                   b = leaf({5, 7}, 3).detach();
  registry.add({"x", x, "lora"});
  registry.add({"frozen", frozen, "lora"});
  registry.set_trainable("frozen", false);
  {
    const parallel::NarrowGradients narrow(registry);
    (x * a).sum().backward();
    EXPECT_EQ(x.grad().scalar_type(), at::kBFloat16);
    EXPECT_TRUE(at::equal(x.grad(), a.to(at::kBFloat16)));
    (x * b).sum().backward();
    EXPECT_EQ(x.grad().scalar_type(), at::kBFloat16);
    EXPECT_TRUE(at::equal(x.grad(), (a.to(at::kBFloat16).to(at::kFloat) + b).to(at::kBFloat16)))
        << "the second addend is not rounded before it is added";
    registry.zero_grad();
    (x * b).sum().backward();
    EXPECT_TRUE(at::equal(x.grad(), b.to(at::kBFloat16)));
  }
  registry.zero_grad();
  (x * b).sum().backward();
  EXPECT_TRUE(at::equal(x.grad(), b)) << "ordinary again";
}

// Norm and update are those of the rounded gradients in float32, whatever the moments are.
TEST(NarrowGradients, AreWidenedByNormAndUpdate) {
  for (const bool in_8bit : {false, true}) {
    model::ParameterRegistry narrow, wide;
    const std::vector<std::vector<int64_t>> shapes{{40, 129}, {7}, {3, 64, 64}};
    for (size_t i = 0; i < shapes.size(); ++i) {
      for (auto* registry : {&narrow, &wide}) registry->add({"x" + std::to_string(i), leaf(shapes[i], i), "lora"});
      const at::Tensor g = leaf(shapes[i], 10 + i).detach().to(at::kBFloat16);
      at::Tensor n = narrow.all()[i].tensor, w = wide.all()[i].tensor;
      n.mutable_grad() = g;
      w.mutable_grad() = g.to(at::kFloat);
    }
    EXPECT_EQ(global_grad_norm(narrow), global_grad_norm(wide));
    AdamW a(narrow, {{"lora", {1e-2, 0.1}}}, {0.9, 0.95, 1e-8, in_8bit}),
        b(wide, {{"lora", {1e-2, 0.1}}}, {0.9, 0.95, 1e-8, in_8bit});
    EXPECT_EQ(a.step(1.0, 0.5), b.step(1.0, 0.5));
    for (size_t i = 0; i < shapes.size(); ++i)
      EXPECT_TRUE(at::equal(narrow.all()[i].tensor, wide.all()[i].tensor)) << in_8bit << " " << i;
  }
}

TEST(NarrowGradients, ARunFollowsFloat32OnesAndResumesBitForBit) {
  const TemporaryFolder folder;
  const auto world = moegraft::testing::make_tiny_world(folder.path());
  for (const OptimizerKind optimizer : {OptimizerKind::adamw, OptimizerKind::adamw_8bit}) {
    const auto config_of = [&](const std::string& dir, GradientDtype gradients) {
      run::RunConfig c = world.config;
      c.run.dir = (world.dir / (dir + config::name_of(optimizer))).string();
      c.adapters[0].rank = 64;  // large enough for 8-bit moments
      c.train.steps = 8;
      c.train.accumulation = 4;
      c.train.clip = 0.05;  // below every norm: it acts
      c.train.optimizer = optimizer, c.train.gradients = gradients;
      c.train.sample_prompts.clear();
      c.checkpoint.keep = 100;
      return c;
    };
    const auto exact = config_of("exact", GradientDtype::float32), whole = config_of("whole", GradientDtype::bf16),
               part = config_of("part", GradientDtype::bf16);
    train(exact);
    train(whole);
    train(part);
    const auto a = moegraft::testing::training_losses(exact.run.dir),
               b = moegraft::testing::training_losses(whole.run.dir);
    ASSERT_EQ(a.size(), 8u);
    ASSERT_EQ(b.size(), 8u);
    EXPECT_NE(a.back(), b.back()) << "bf16 was used";
    for (size_t i = 0; i < 8; ++i)
      EXPECT_NEAR(b[i], a[i], 0.01 * a[i]) << config::name_of(optimizer) << " step " << i + 1;
    for (const int64_t step : {6, 8})
      fs::remove_all(fs::path(part.run.dir) / "checkpoints" / checkpoint::step_name(step));
    train(part, "auto");
    EXPECT_EQ(moegraft::testing::training_losses(part.run.dir), b);
    const auto last = [](const run::RunConfig& c) {
      return *checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints");
    };
    for (const char* file : {"adapter.safetensors", "optimizer.safetensors"})
      EXPECT_EQ(io::read_file(last(whole) / file), io::read_file(last(part) / file)) << file;
    auto changed = whole;
    changed.train.gradients = GradientDtype::float32;
    EXPECT_THROW(train(changed, "auto"), UsageError);
  }
  run::RunConfig many = world.config;
  many.train.gradients = GradientDtype::bf16, many.train.accumulation = 129;
  EXPECT_THROW(many.train.validate("train"), UsageError);
}

TEST(NarrowGradients, ThePlanCountsTwoBytesEach) {
  planning::MemoryRequest r;
  r.spec.family = "qwen3_moe";
  r.spec.hidden_size = 64, r.spec.num_layers = 2, r.spec.num_heads = 4, r.spec.num_kv_heads = 4, r.spec.head_dim = 16,
  r.spec.num_experts = 6, r.spec.num_experts_per_tok = 2;
  r.spec.moe_intermediate_size = r.spec.intermediate_size = 48, r.spec.vocab_size = 50;
  r.spec.layers.assign(2, {});
  r.tokens = 64, r.device = at::kCUDA;
  r.adapters = {{4, {model::Site::gate, model::Site::q}, {}}};
  const int64_t trained = planning::count_trained(r).total();
  const planning::MemoryPlan wide = planning::plan_memory(r);
  EXPECT_EQ(wide.gradients, 4 * trained);
  r.narrow_gradients = true;
  EXPECT_EQ(planning::plan_memory(r).gradients, 2 * trained);
  EXPECT_EQ(planning::plan_memory(r).total(), wide.total() - 2 * trained);
  r.data_size = 2, r.bucket_bytes = trained / 8;  // sums over processes: four buckets as float32
  EXPECT_EQ(planning::plan_memory(r).gradients, 2 * trained + 4 * (trained / 8));
  r.bucket_bytes = int64_t{1} << 40;
  EXPECT_EQ(planning::plan_memory(r).gradients, 6 * trained);
}

}  // namespace
}  // namespace moegraft::train
