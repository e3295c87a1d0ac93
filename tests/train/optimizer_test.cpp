#include "moegraft/train/optimizer.h"

#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include "libtorch.h"

#include <cmath>
#include <limits>
#include <numbers>

#include "../support/launches.h"
#include "moegraft/base/check.h"
#include "moegraft/train/schedule.h"

namespace moegraft::train {
namespace {

at::Tensor leaf(const at::Tensor& values) { return values.clone().set_requires_grad(true); }
void set_grad(const at::Tensor& tensor, const at::Tensor& grad) {
  at::Tensor target = tensor;
  target.mutable_grad() = grad;
}

TEST(AdamW, FirstStepHasItsClosedForm) {
  // First step: m/(1-b1) = g and v/(1-b2) = g^2, so x <- x(1 - lr wd) - lr g/(|g| + eps).
  model::ParameterRegistry registry;
  const auto x = leaf(at::full({2, 2}, 3.0)), b = leaf(at::full({2}, 3.0));
  registry.add({"x", x, "base"});
  registry.add({"b", b, "base"});
  AdamW optimizer(registry, {{"base", {0.5, 0.1}}}, {0.9, 0.99, 1e-8});
  set_grad(x, at::full({2, 2}, -4.0));
  set_grad(b, at::full({2}, 0.25));
  EXPECT_EQ(optimizer.step(0.5), 2);
  EXPECT_NEAR(x[0][0].item<double>(), 3.0 * (1 - 0.25 * 0.1) + 0.25, 1e-6);
  EXPECT_NEAR(b[0].item<double>(), 3.0 - 0.25, 1e-6) << "vectors are not decayed";
  EXPECT_FALSE(x.grad_fn());
}

TEST(AdamW, FollowsLibTorchForManySteps) {
  at::manual_seed(3);
  model::ParameterRegistry registry;
  const auto ours_a = leaf(torch::randn({33, 17})), ours_b = leaf(torch::randn({5, 7, 11}));
  registry.add({"a", ours_a, "lora"});
  registry.add({"b", ours_b, "embeddings"});
  const auto theirs_a = leaf(ours_a.detach()), theirs_b = leaf(ours_b.detach());
  torch::optim::AdamW reference(std::vector<torch::optim::OptimizerParamGroup>{
      torch::optim::OptimizerParamGroup({theirs_a},
                                        std::make_unique<torch::optim::AdamWOptions>(
                                            torch::optim::AdamWOptions(1e-2).betas({0.9, 0.95}).weight_decay(0.1))),
      torch::optim::OptimizerParamGroup({theirs_b},
                                        std::make_unique<torch::optim::AdamWOptions>(
                                            torch::optim::AdamWOptions(3e-3).betas({0.9, 0.95}).weight_decay(0.0)))});
  AdamW optimizer(registry, {{"lora", {1e-2, 0.1}}, {"embeddings", {3e-3, 0.0}}});
  for (int i = 0; i < 50; ++i) {
    const auto ga = torch::randn({33, 17}), gb = torch::randn({5, 7, 11}) * 1e-3;
    set_grad(ours_a, ga), set_grad(theirs_a, ga.clone()), set_grad(ours_b, gb), set_grad(theirs_b, gb.clone());
    optimizer.step(1.0);
    reference.step();
  }
  // Both in float32; the fused kernel orders a handful of roundings differently: 50 steps of 1e-2 at 6e-8 relative
  // each.
  EXPECT_LE((ours_a - theirs_a).abs().max().item<double>(), 2e-6);
  EXPECT_LE((ours_b - theirs_b).abs().max().item<double>(), 2e-6);
}

TEST(AdamW, WithoutGradientNothingMovesButTheStepCounts) {
  model::ParameterRegistry registry;
  const auto x = leaf(at::ones({2, 2})), y = leaf(at::ones({2, 2}));
  registry.add({"x", x, "lora"});
  registry.add({"y", y, "lora"});
  AdamW optimizer(registry, {{"lora", {0.1, 0.5}}});
  EXPECT_EQ(global_grad_norm(registry), 0.0);
  EXPECT_EQ(optimizer.step(1.0), 0);
  EXPECT_EQ(optimizer.steps(), 1);
  EXPECT_TRUE(at::equal(x, at::ones({2, 2}))) << "not even decayed";
  set_grad(x, at::ones({2, 2}));
  EXPECT_EQ(optimizer.step(1.0), 1);
  const auto state = optimizer.state();
  EXPECT_EQ(state.at("x.step").item<float>(), 1.0f) << "bias correction counts its own updates";
  EXPECT_EQ(state.at("y.step").item<float>(), 0.0f);
  EXPECT_TRUE(at::equal(y, at::ones({2, 2})));
  EXPECT_TRUE(at::equal(state.at("y.exp_avg"), at::zeros({2, 2})));
}

TEST(AdamW, AcceptsStridedGradients) {
  model::ParameterRegistry registry;
  const auto x = leaf(at::zeros({2, 3})), y = leaf(at::zeros({2, 3}));
  registry.add({"x", x, "lora"});
  registry.add({"y", y, "lora"});
  AdamW optimizer(registry, {{"lora", {0.1, 0.0}}});
  const auto g = at::arange(6, at::kFloat).reshape({3, 2});
  set_grad(x, g.t());
  set_grad(y, g.t().contiguous());
  EXPECT_NEAR(global_grad_norm(registry), std::sqrt(2 * 55.0), 1e-12);
  optimizer.step(1.0);
  optimizer.step(1.0);
  EXPECT_TRUE(at::equal(x, y));
}

TEST(AdamW, StateRestoresBitForBit) {
  const auto run = [](int steps, int save_at) {
    at::manual_seed(5);
    const auto start = torch::randn({8, 9});
    std::vector<at::Tensor> grads;
    for (int i = 0; i < steps; ++i) grads.push_back(torch::randn({8, 9}));
    auto registry = std::make_unique<model::ParameterRegistry>();
    registry->add({"x", leaf(start), "lora"});
    auto optimizer = std::make_unique<AdamW>(*registry, std::map<std::string, GroupOptions>{{"lora", {0.1, 0.1}}});
    for (int i = 0; i < steps; ++i) {
      if (i == save_at) {
        io::TensorMap state, values;
        for (const auto& [name, tensor] : optimizer->state()) state[name] = tensor.clone();
        for (const auto& [name, tensor] : checkpoint::parameter_tensors(*registry)) values[name] = tensor.clone();
        optimizer.reset();
        registry = std::make_unique<model::ParameterRegistry>();
        registry->add({"x", leaf(at::zeros({8, 9})), "lora"});
        checkpoint::load_parameters(*registry, values);
        optimizer = std::make_unique<AdamW>(*registry, std::map<std::string, GroupOptions>{{"lora", {0.1, 0.1}}});
        optimizer->load_state(state);
        EXPECT_EQ(optimizer->steps(), i);
      }
      set_grad(registry->all()[0].tensor, grads[i]);
      optimizer->step(1.0);
    }
    return registry->all()[0].tensor.detach().clone();
  };
  EXPECT_TRUE(at::equal(run(10, -1), run(10, 4)));
}

TEST(AdamW, RefusesForeignStateAndUnknownGroups) {
  model::ParameterRegistry registry;
  registry.add({"x", leaf(at::zeros({2})), "lora"});
  AdamW optimizer(registry, {{"lora", {}}});
  const auto good = optimizer.state();
  auto missing = good, extra = good, shape = good;
  missing.erase("x.exp_avg");
  extra["z.step"] = at::zeros({});
  shape["x.exp_avg_sq"] = at::zeros({3});
  EXPECT_NO_THROW(optimizer.load_state(good));
  EXPECT_THROW(optimizer.load_state(missing), UserError);
  EXPECT_THROW(optimizer.load_state(extra), UserError);
  EXPECT_THROW(optimizer.load_state(shape), UserError);
  EXPECT_THROW(checkpoint::load_parameters(registry, {}), UserError);
  EXPECT_THROW(checkpoint::load_parameters(registry, {{"x", at::zeros({2}, at::kHalf)}}), UserError);
  EXPECT_THROW(AdamW(registry, {{"embeddings", {}}}), UsageError);
}

TEST(Clip, FactorReachesTheGivenNorm) {
  model::ParameterRegistry registry;
  const auto x = leaf(at::zeros({1})), y = leaf(at::zeros({1}));
  registry.add({"x", x, "lora"});
  registry.add({"y", y, "base"});
  set_grad(x, at::full({1}, 3.0));
  set_grad(y, at::full({1}, 4.0));
  EXPECT_EQ(global_grad_norm(registry), 5.0);
  EXPECT_EQ(clip_factor(5.0, 0.0), 1.0) << "off";
  EXPECT_EQ(clip_factor(5.0, 5.0), 1.0) << "at the limit nothing changes";
  EXPECT_EQ(clip_factor(5.0, 1.0), 0.2);
  EXPECT_EQ(clip_factor(0.0, 1.0), 1.0);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    EXPECT_EQ(clip_factor(bad, 1.0), 1.0);
}

TEST(Clip, TheStepTakesTheFactor) {
  const auto run = [](bool moments_8bit, double factor, double grad_scale) {
    at::manual_seed(2);
    model::ParameterRegistry registry;
    const auto x = leaf(torch::randn({100, 50})), y = leaf(torch::randn({7}));
    registry.add({"x", x, "lora"});
    registry.add({"y", y, "lora"});
    AdamW optimizer(registry, {{"lora", {0.1, 0.1}}},
                    {0.9, 0.95, 0.5, moments_8bit});  // a large epsilon: else the scale of gradients cancels
    for (int i = 0; i < 3; ++i) {
      set_grad(x, torch::randn({100, 50}) * grad_scale);
      set_grad(y, torch::randn({7}) * grad_scale);
      optimizer.step(1.0, factor);
    }
    return at::cat({x.detach().flatten(), y.detach()});
  };
  for (const bool moments_8bit : {false, true}) {
    EXPECT_TRUE(at::equal(run(moments_8bit, 0.25, 1.0), run(moments_8bit, 1.0, 0.25)))
        << "a power of two: no rounding differs";
    EXPECT_FALSE(at::allclose(run(moments_8bit, 0.25, 1.0), run(moments_8bit, 1.0, 1.0)));
  }
  EXPECT_LE((run(false, 0.3, 1.0) - run(false, 1.0, 0.3)).abs().max().item<double>(), 1e-6);
}

TEST(Clip, NormDependsNeitherOnThreadsNorOnSize) {
  at::manual_seed(1);
  const auto g = torch::randn({300001});
  model::ParameterRegistry registry;
  const auto x = leaf(at::zeros({300001}));
  registry.add({"x", x, "lora"});
  set_grad(x, g);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const double one = global_grad_norm(registry);
  at::set_num_threads(3);
  const double three = global_grad_norm(registry);
  at::set_num_threads(threads);
  EXPECT_EQ(one, three);
  EXPECT_NEAR(one, g.to(at::kDouble).norm().item<double>(), 1e-9);
  g[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(global_grad_norm(registry)));
  g[7] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isinf(global_grad_norm(registry)));
}

// The device's half of the norm, on the host: the same operations.
TEST(Clip, SumOfSquaresIsExactEnoughForAnyList) {
  at::manual_seed(4);
  std::vector<at::Tensor> tensors{torch::randn({300, 70}),    at::empty({0, 5}), torch::randn({7}).to(at::kBFloat16),
                                  torch::randn({40, 30}).t(), torch::randn({}),  torch::randn({5000}) * 1e-3};
  double expected = 0;
  for (const auto& t : tensors) expected += t.to(at::kDouble).square().sum().item<double>();
  EXPECT_EQ(sum_of_squares(tensors).scalar_type(), at::kDouble);
  EXPECT_NEAR(sum_of_squares(tensors).item<double>(), expected, 1e-13 * expected);
  EXPECT_EQ(sum_of_squares({}).item<double>(), 0.0);
  EXPECT_EQ(sum_of_squares({at::empty({0})}).item<double>(), 0.0);
  // 2^24 + 1 squares of one: a float32 sum ends at 2^24.
  EXPECT_EQ(sum_of_squares({at::ones({(1 << 24) + 1})}).item<double>(), double((1 << 24) + 1));
  tensors[3][2][1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(sum_of_squares(tensors).item<double>()));
  tensors[3][2][1] = -std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isinf(sum_of_squares(tensors).item<double>()));
}

TEST(Clip, WhatADeviceHasOfTheNormIsAddedToTheHosts) {
  model::ParameterRegistry registry;
  const auto x = leaf(at::zeros({1}));
  registry.add({"x", x, "lora"});
  set_grad(x, at::full({1}, 3.0));
  EXPECT_FALSE(queue_grad_squares(registry).defined()) << "nothing is on a device";
  EXPECT_EQ(global_grad_norm(registry, nullptr, {16.0, 0.0}), 5.0);
  EXPECT_TRUE(std::isnan(global_grad_norm(registry, nullptr, {std::numeric_limits<double>::quiet_NaN(), 0.0})));
}

TEST(AdamW, LaunchesDoNotCountTheParameters) {
  const auto count = [](int parameters) {
    model::ParameterRegistry registry;
    std::vector<at::Tensor> grads;
    for (int i = 0; i < parameters; ++i) {
      const auto x = leaf(at::zeros({2, 3}));
      registry.add({"x" + std::to_string(i), x, "lora"});
      set_grad(x, at::ones({2, 3}));
      grads.push_back(x.grad());
    }
    AdamW optimizer(registry, {{"lora", {0.1, 0.1}}});
    return std::pair(launches([&] { optimizer.step(1.0, 0.5); }), launches([&] { sum_of_squares(grads); }));
  };
  EXPECT_EQ(count(2), count(40));
  EXPECT_LT(count(40).first, 10);
}

TEST(Schedule, ExactValues) {
  const Schedule cosine{ScheduleKind::cosine, 4, 13, 0.1};
  EXPECT_DOUBLE_EQ(cosine.factor(0), 0.25);
  EXPECT_DOUBLE_EQ(cosine.factor(3), 1.0);
  EXPECT_DOUBLE_EQ(cosine.factor(4), 1.0);
  EXPECT_DOUBLE_EQ(cosine.factor(8), 0.55);  // half way: (1 + 0.1) / 2
  EXPECT_DOUBLE_EQ(cosine.factor(6), 0.1 + 0.9 * 0.5 * (1 + std::cos(std::numbers::pi / 4)));
  EXPECT_DOUBLE_EQ(cosine.factor(12), 0.1);
  EXPECT_DOUBLE_EQ(cosine.factor(1000), 0.1);
  const Schedule linear{ScheduleKind::linear, 0, 11, 0.5};
  EXPECT_DOUBLE_EQ(linear.factor(0), 1.0);
  EXPECT_DOUBLE_EQ(linear.factor(4), 0.8);
  EXPECT_DOUBLE_EQ(linear.factor(10), 0.5);
  const Schedule constant{ScheduleKind::constant, 2, 10, 0.5};
  EXPECT_DOUBLE_EQ(constant.factor(0), 0.5);
  EXPECT_DOUBLE_EQ(constant.factor(9), 1.0);
  EXPECT_DOUBLE_EQ((Schedule{ScheduleKind::cosine, 0, 1, 0.0}.factor(0)), 1.0) << "a run of one step still learns";
  EXPECT_DOUBLE_EQ((Schedule{ScheduleKind::cosine, 50, 10, 0.0}.factor(9)), 0.2) << "warm-up longer than the run";
}

}  // namespace
}  // namespace moegraft::train
