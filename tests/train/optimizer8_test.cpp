// AdamW with 8-bit moments: against float32 moments, its size, its checkpoints, and a run through the trainer.
#include <gtest/gtest.h>

#include <cmath>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/train/optimizer.h"
#include "moegraft/train/trainer.h"
#include "support/metrics.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;

constexpr AdamWOptions kFloat32{0.9, 0.95, 1e-8, false}, k8bit{0.9, 0.95, 1e-8, true};

at::Tensor leaf(const at::Tensor& values) { return values.detach().clone().set_requires_grad(true); }
void set_grad(const at::Tensor& tensor, const at::Tensor& grad) {
  at::Tensor target = tensor;
  target.mutable_grad() = grad;
}

TEST(AdamW8, TheFirstStepIsThatOfFloat32Moments) {
  // Nothing was rounded yet: the update uses the moments before they are.
  at::manual_seed(1);
  const auto start = at::randn({40, 129}), grad = at::randn({40, 129}) * at::exp(3 * at::randn({40, 129}));
  const auto run = [&](const AdamWOptions& options) {
    model::ParameterRegistry registry;
    const auto x = leaf(start);
    registry.add({"x", x, "lora"});
    AdamW optimizer(registry, {{"lora", {1e-2, 0.1}}}, options);
    set_grad(x, grad);
    EXPECT_EQ(optimizer.step(1.0), 1);
    return x.detach();
  };
  EXPECT_LE((run(k8bit) - run(kFloat32)).abs().max().item<double>(), 5e-7);  // an ulp of values up to 4
}

TEST(AdamW8, LaterUpdatesStayWithinTheBinsOfFloat32Moments) {
  // Independent gradients: the update's relative error, over all elements, is a few bins' width at most (roots: 0.35 %
  // to 3.5 % of the value in the decade below the block's largest; measured 0.04).
  at::manual_seed(2);
  model::ParameterRegistry exact, rounded;
  const auto x = leaf(at::zeros({64, 256})), y = leaf(at::zeros({64, 256}));
  exact.add({"x", x, "lora"});
  rounded.add({"x", y, "lora"});
  AdamW a(exact, {{"lora", {1.0, 0.0}}}, kFloat32), b(rounded, {{"lora", {1.0, 0.0}}}, k8bit);
  const auto scale = at::exp(0.5 * at::randn({64, 256}) - 10);
  for (int i = 0; i < 50; ++i) {
    const auto before_x = x.detach().clone(), before_y = y.detach().clone(), g = at::randn({64, 256}) * scale;
    set_grad(x, g);
    set_grad(y, g);
    a.step(1.0);
    b.step(1.0);
    const auto update = x.detach() - before_x, error = (y.detach() - before_y) - update;
    EXPECT_LE((error.norm() / update.norm()).item<double>(), 0.08) << "step " << i;
  }
}

// A two-layer network that learns a fixed one from noisy samples; both layers large enough for 8 bits. Returns the loss
// of every step.
std::vector<double> learn(const AdamWOptions& options) {
  at::manual_seed(3);
  const auto target = at::randn({32, 16}) / std::sqrt(32.0);
  model::ParameterRegistry registry;
  const auto a = leaf(at::randn({32, 256}) / std::sqrt(32.0)), b = leaf(at::randn({256, 16}) * 0.05);
  registry.add({"a", a, "lora"});
  registry.add({"b", b, "lora"});
  AdamW optimizer(registry, {{"lora", {3e-3, 0.01}}}, options);
  std::vector<double> losses;
  for (int i = 0; i < 150; ++i) {
    const auto x = at::randn({64, 32}), wanted = at::tanh(at::matmul(x, target)) + 0.1 * at::randn({64, 16});
    registry.zero_grad();
    const auto loss = (at::matmul(at::silu(at::matmul(x, a)), b) - wanted).square().mean();
    loss.backward();
    optimizer.step(1.0);
    losses.push_back(loss.item<double>());
  }
  return losses;
}

TEST(AdamW8, LearnsLikeFloat32Moments) {
  const auto exact = learn(kFloat32), rounded = learn(k8bit);
  EXPECT_LT(exact.back(), 0.3 * exact.front());
  for (size_t i = 0; i < exact.size(); ++i) EXPECT_NEAR(rounded[i], exact[i], 0.05 * exact[i]) << "step " << i;
}

TEST(AdamW8, TakesAQuarterOfTheBytes) {
  model::ParameterRegistry registry;
  registry.add({"large", leaf(at::zeros({300, 1000})), "lora"});
  AdamW exact(registry, {{"lora", {}}}, kFloat32), rounded(registry, {{"lora", {}}}, k8bit);
  EXPECT_EQ(exact.state_bytes(), 300000 * 8 + 4);
  EXPECT_EQ(rounded.state_bytes(), 300000 * 2 + 2 * 4 * 1172 + 4);  // 1172 blocks of 256
  model::ParameterRegistry small;
  small.add({"small", leaf(at::zeros({kSmallest8bit - 1})), "lora"});
  AdamW kept(small, {{"lora", {}}}, k8bit);
  EXPECT_EQ(kept.state_bytes(), (kSmallest8bit - 1) * 8 + 4) << "small tensors keep float32 moments";
  EXPECT_TRUE(kept.state().contains("small.exp_avg"));
}

TEST(AdamW8, OddSizesEmptyTensorsAndMissingGradients) {
  at::manual_seed(4);
  model::ParameterRegistry registry;
  const auto odd = leaf(at::randn({4099})), strided = leaf(at::randn({65, 67})), empty = leaf(at::zeros({0, 5})),
             still = leaf(at::ones({5000}));
  registry.add({"odd", odd, "lora"});
  registry.add({"strided", strided, "lora"});
  registry.add({"empty", empty, "lora"});
  registry.add({"still", still, "lora"});
  AdamW optimizer(registry, {{"lora", {0.1, 0.1}}}, k8bit);
  set_grad(odd, at::ones({4099}));
  set_grad(strided, at::ones({67, 65}).t());
  set_grad(empty, at::zeros({0, 5}));
  const auto before = odd.detach().clone();
  EXPECT_EQ(optimizer.step(1.0), 3);
  EXPECT_LE((before - odd - 0.1).abs().max().item<double>(), 1e-6) << "every element moves by lr, the last block's too";
  EXPECT_TRUE(at::equal(still, at::ones({5000})));
  const auto state = optimizer.state();
  EXPECT_EQ(state.at("odd.step").item<float>(), 1.0f);
  EXPECT_EQ(state.at("still.step").item<float>(), 0.0f) << "its own count";
  EXPECT_EQ(state.at("odd.exp_avg.scales").numel(), 17);
}

// adapters/vera.cpp keeps factors made of its parameters until their versions change.
TEST(AdamW, AStepCountsAsAWriteOfEveryParameter) {
  for (const bool moments_8bit : {false, true}) {
    model::ParameterRegistry registry;
    const auto large = leaf(at::ones({5000})), matrix = leaf(at::ones({3, 4})), still = leaf(at::ones({6}));
    registry.add({"large", large, "lora"});
    registry.add({"matrix", matrix, "lora"});
    registry.add({"still", still, "lora"});
    AdamWOptions options;
    options.moments_8bit = moments_8bit;
    AdamW optimizer(registry, {{"lora", {0.1, 0.1}}}, options);
    set_grad(large, at::ones({5000}));
    set_grad(matrix, at::ones({3, 4}));
    const auto before = std::tuple(large._version(), matrix._version(), still._version());
    optimizer.step(1.0);
    EXPECT_GT(large._version(), std::get<0>(before));
    EXPECT_GT(matrix._version(), std::get<1>(before));
    EXPECT_EQ(still._version(), std::get<2>(before));
  }
}

TEST(AdamW8, StateRestoresBitForBit) {
  const auto run = [](int save_at) {
    at::manual_seed(5);
    const auto start = at::randn({80, 90}), small = at::randn({30});
    model::ParameterRegistry registry;
    const auto x = leaf(start), y = leaf(small);
    registry.add({"x", x, "lora"});
    registry.add({"y", y, "lora"});
    auto optimizer =
        std::make_unique<AdamW>(registry, std::map<std::string, GroupOptions>{{"lora", {0.1, 0.1}}}, k8bit);
    for (int i = 0; i < 10; ++i) {
      if (i == save_at) {
        io::TensorMap state;
        for (const auto& [name, tensor] : optimizer->state()) state[name] = tensor.clone();
        optimizer = std::make_unique<AdamW>(registry, std::map<std::string, GroupOptions>{{"lora", {0.1, 0.1}}}, k8bit);
        optimizer->load_state(state);
        EXPECT_EQ(optimizer->steps(), i);
      }
      set_grad(x, at::randn({80, 90}));
      set_grad(y, at::randn({30}));
      optimizer->step(1.0);
    }
    return at::cat({x.detach().flatten(), y.detach()});
  };
  EXPECT_TRUE(at::equal(run(-1), run(4)));
}

TEST(AdamW8, RefusesMomentsOfTheOtherForm) {
  model::ParameterRegistry registry;
  registry.add({"x", leaf(at::zeros({5000})), "lora"});
  AdamW exact(registry, {{"lora", {}}}, kFloat32), rounded(registry, {{"lora", {}}}, k8bit);
  const auto message = [](AdamW& to, const io::TensorMap& state) -> std::string {
    try {
      to.load_state(state);
    } catch (const UserError& e) { return e.what(); }
    return "";
  };
  EXPECT_NE(message(rounded, exact.state()).find("keep train.optimizer: adamw,"), std::string::npos);
  EXPECT_NE(message(exact, rounded.state()).find("keep train.optimizer: adamw_8bit,"), std::string::npos);
  auto missing = rounded.state(), shape = rounded.state();
  missing.erase("x.exp_avg_sq_root.scales");
  shape["x.exp_avg.codes"] = at::zeros({4999}, at::kByte);
  EXPECT_NE(message(rounded, missing).find("x.exp_avg_sq_root.scales"), std::string::npos);
  EXPECT_NE(message(rounded, shape).find("x.exp_avg.codes"), std::string::npos);
  EXPECT_EQ(message(rounded, rounded.state()), "");
}

// Through the trainer: rank 64 gives the expert factors 4 * 64 * 24 and more values.
TEST(AdamW8, ARunFollowsFloat32MomentsAndResumesBitForBit) {
  moegraft::testing::TemporaryFolder folder;
  const auto world = moegraft::testing::make_tiny_world(folder.path());
  const auto config_of = [&](const std::string& dir, OptimizerKind optimizer) {
    run::RunConfig c = world.config;
    c.run.dir = (world.dir / dir).string();
    c.adapters[0].rank = 64;
    c.train.steps = 8;
    c.train.optimizer = optimizer;
    c.train.sample_prompts.clear();
    c.checkpoint.keep = 100;
    return c;
  };
  const auto exact = config_of("exact", OptimizerKind::adamw), whole = config_of("whole", OptimizerKind::adamw_8bit),
             part = config_of("part", OptimizerKind::adamw_8bit);
  train(exact);
  train(whole);
  train(part);
  const auto a = moegraft::testing::training_losses(exact.run.dir),
             b = moegraft::testing::training_losses(whole.run.dir);
  ASSERT_EQ(a.size(), 8u);
  ASSERT_EQ(b.size(), 8u);
  EXPECT_NE(a.back(), b.back()) << "8 bits were used";
  for (size_t i = 0; i < 8; ++i) EXPECT_NEAR(b[i], a[i], 0.02 * a[i]) << "step " << i + 1;

  for (const int64_t step : {6, 8})
    fs::remove_all(fs::path(part.run.dir) / "checkpoints" / checkpoint::step_name(step));
  train(part, "auto");
  EXPECT_EQ(moegraft::testing::training_losses(part.run.dir), b);
  const auto last = [](const run::RunConfig& c) {
    return *checkpoint::find_latest(fs::path(c.run.dir) / "checkpoints");
  };
  for (const char* file : {"adapter.safetensors", "optimizer.safetensors"})
    EXPECT_EQ(io::read_file(last(whole) / file), io::read_file(last(part) / file)) << file;
  int in_8bit = 0;
  for (const auto& [name, tensor] : checkpoint::load(last(whole)).optimizer)
    in_8bit += name.ends_with(".exp_avg.codes");
  EXPECT_GT(in_8bit, 0);

  auto changed = whole;
  changed.train.optimizer = OptimizerKind::adamw;
  try {
    train(changed, "auto");
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("train.optimizer"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace moegraft::train
