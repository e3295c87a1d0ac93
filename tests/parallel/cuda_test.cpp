// The device's paths with a group of one process on NCCL: tokens that travel to themselves, gradients, gathered
// experts, owners' values.

#include "libtorch.h"

#include <gtest/gtest.h>

#include "moegraft/distributed/world.h"
#include "moegraft/parallel/dispatcher.h"
#include "moegraft/parallel/gradients.h"
#include "moegraft/parallel/sharded_weights.h"
#include "support/gpu.h"

namespace moegraft::parallel {
namespace {

distributed::Mesh mesh_of_one() {
  auto world = distributed::World::join(
      {}, {.device = at::Device(at::kCUDA, 0), .timeout = std::chrono::seconds(60), .backend_for_one = true});
  return distributed::make_mesh(std::move(world), 1);
}

TEST(ParallelCuda, TokensThatTravelToThemselvesAreLocalOnes) {
  MOEGRAFT_NEEDS_GPU();
  constexpr int64_t T = 300, K = 3, E = 8, D = 64, F = 32;
  const distributed::Mesh mesh = mesh_of_one();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    at::manual_seed(1);
    const auto options = at::TensorOptions(at::kCUDA);
    const at::Tensor x = at::randn({T, D}, options).to(dtype), weights = at::rand({T, K}, options),
                     ids = at::rand({T, E}, options).argsort(int64_t{1}).narrow(1, 0, K).contiguous();
    const at::Tensor group = at::randint(0, 2, {T}, options.dtype(at::kLong)),
                     dy = at::randn({T, D}, options).to(dtype);
    kernels::ExpertFfnWeights experts;
    for (int64_t e = 0; e < E; ++e) {
      experts.gate_FD.push_back((0.2 * at::randn({F, D}, options)).to(dtype));
      experts.up_FD.push_back((0.2 * at::randn({F, D}, options)).to(dtype));
      experts.down_DF.push_back((0.2 * at::randn({D, F}, options)).to(dtype));
    }
    model::LocalDispatcher local;
    ExpertParallelDispatcher spread(mesh);
    std::vector<at::Tensor> results[2];
    for (const int i : {0, 1}) {
      model::TokenDispatcher& dispatcher = i ? static_cast<model::TokenDispatcher&>(spread) : local;
      const at::Tensor x_leaf = x.clone().requires_grad_(true), w_leaf = weights.clone().requires_grad_(true);
      const auto routed = dispatcher.dispatch(x_leaf, ids, w_leaf, E, group, 2);
      const at::Tensor y =
          dispatcher.combine(kernels::moe_ffn(routed.x_XD, routed.weights_XK, routed.dispatch, experts, {}), routed);
      y.backward(dy);
      results[i] = {y.detach(), x_leaf.grad(), w_leaf.grad()};
    }
    for (size_t i = 0; i < 3; ++i)
      EXPECT_TRUE(at::equal(results[0][i], results[1][i]))
          << "one partial sum per token: the same bits; result " << i << ", " << dtype;
  }
}

TEST(ParallelCuda, GradientsLieInTheBuckets) {
  MOEGRAFT_NEEDS_GPU();
  const distributed::Mesh mesh = mesh_of_one();
  model::ParameterRegistry registry;
  for (int64_t l = 0; l < 3; ++l)
    registry.add({.name = "layers." + std::to_string(l) + ".w",
                  .tensor = at::randn({40, 40}, at::kCUDA).requires_grad_(true),
                  .group = "base",
                  .layer = l});
  registry.add({"unused", at::randn({4}, at::kCUDA).requires_grad_(true), "base"});
  const auto loss = [&](const at::Tensor& x) {
    at::Tensor y = x;
    for (int64_t l = 0; l < 3; ++l) y = at::tanh(at::linear(y, registry.all()[size_t(l)].tensor));
    return y.square().sum();
  };
  const at::Tensor x = at::randn({16, 40}, at::kCUDA);
  loss(x).backward();
  std::vector<at::Tensor> want;
  for (const auto& p : registry.all()) want.push_back(p.tensor.grad());
  GradientReducer reducer(registry, mesh, 1);
  for (int round = 0; round < 2; ++round) {
    reducer.begin_step();
    reducer.last_backward();
    loss(x).backward();
    reducer.finish();
    for (size_t l = 0; l < 3; ++l) EXPECT_TRUE(at::allclose(registry.all()[l].tensor.grad(), want[l], 1e-5, 1e-6)) << l;
    EXPECT_FALSE(registry.all()[3].tensor.grad().defined());
  }
}

class Nothing : public model::WeightProvider {
 public:
  kernels::Matrix embedding_VD() override { return {}; }
  kernels::Matrix head_VD() override { return {}; }
  at::Tensor final_norm_D() override { return {}; }
  model::LayerWeights layer(int64_t) override { return {}; }
  model::ExpertWeights experts(int64_t, int64_t, int64_t) override { return {}; }
  at::ScalarType dtype() const override { return at::kBFloat16; }
  at::Device device() const override { return at::Device(at::kCUDA, 0); }
};

TEST(ParallelCuda, GatheredExpertsAreTheWhole) {
  MOEGRAFT_NEEDS_GPU();
  const distributed::Mesh mesh = mesh_of_one();
  ShardedWeights weights(std::make_shared<Nothing>(), mesh);
  std::vector<model::ExpertWeights> layers(4);
  for (auto& w : layers) {
    for (int e = 0; e < 3; ++e) {
      w.gate_FD.push_back(at::randn({128, 64}).to(at::kBFloat16));
      w.up_FD.push_back(at::randn({128, 64}).to(at::kBFloat16));
      w.down_DF.push_back(at::randn({64, 128}).to(at::kBFloat16));
    }
    weights.add_layer(w);
  }
  for (int round = 0; round < 3; ++round)
    for (int64_t l = 0; l < 4; ++l) {
      weights.prefetch(l + 1);
      const auto got = weights.experts(l, 0, 3);
      for (size_t e = 0; e < 3; ++e)
        EXPECT_TRUE(at::equal(got.gate_FD[e].cpu(), layers[size_t(l)].gate_FD[e]) &&
                    at::equal(got.up_FD[e].cpu(), layers[size_t(l)].up_FD[e]) &&
                    at::equal(got.down_DF[e].cpu(), layers[size_t(l)].down_DF[e]))
            << "layer " << l;
    }
  EXPECT_EQ(weights.traffic().replaced, 0);
}

}  // namespace
}  // namespace moegraft::parallel
