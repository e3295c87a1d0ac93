// The public operations' device branches (norm.cpp, route.cpp, cross_entropy.cpp, moe_ffn.cpp) with the device emulated
// on the host.
#ifndef MOEGRAFT_HAVE_CUDA

#include "../support/emulated_device.h"
#include "../support/launches.h"
#include "cuda_cases.h"

namespace moegraft::kernels::cuda {
namespace {

TEST(EmulatedDevice, PublicOperationsEqualTheCpus) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Named host = public_ops(at::kCPU, dtype);
    const int64_t before = emulated_layers;
    const Named device = [&] {
      const Emulation on;
      return public_ops(at::kCPU, dtype);
    }();
    EXPECT_EQ(emulated_layers - before, 2);
    compare_public_ops(device, host, dtype);
  }
}

TEST(EmulatedDevice, SumsOfRowsHaveTheHostsBits) {
  const at::Tensor places =
      at::randint(-1, 40, {23, 4}, at::make_generator<at::CPUGeneratorImpl>(uint64_t{3}), at::kInt);
  for (const int64_t width : {3, 8, 64})
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor rows = randn({40, width}, 5).to(dtype), host = sum_rows(rows, places);
      const Emulation on;
      EXPECT_TRUE(at::equal(sum_rows(rows, places), host)) << width << " " << dtype;
    }
}

TEST(EmulatedDevice, NormsOfAnyShapeAndUnusedOutputs) {
  const Emulation on;
  const at::Tensor x = randn({3, 7}, 1).set_requires_grad(true), w = randn({7}, 2).set_requires_grad(true);
  const ResidualNorm n = residual_norm(x, x * 0.5, w, 1e-5, at::kBFloat16, true);
  n.x_XD.sum().backward();  // neither y is used
  EXPECT_LT(distance(x.grad(), at::full({3, 7}, 1.5)), 1e-6);
  const Route r = kernels::route(randn({4, 6}, 3).set_requires_grad(true), 2, true);
  EXPECT_FALSE(r.topk_ids_TK.requires_grad());
  EXPECT_TRUE(r.topk_weights_TK.requires_grad() && r.probs_TE.requires_grad());
}

TEST(EmulatedDevice, RoutingStatisticsAreTwoLaunches) {
  const Route r = Host::route_forward(randn({50, 8}, 1), 2, true);
  const at::Tensor sums = at::zeros({2, 19}, at::kDouble), modality = at::arange(50, at::kLong) % 2;
  const auto count = [&] {
    return launches([&] { kernels::add_routing_sums(sums, r.probs_TE, r.topk_ids_TK, modality); });
  };
  const int64_t host = count();
  const Emulation on;
  EXPECT_EQ(count(), 0) << "of the library; the host needs " << host;
  EXPECT_GT(host, 10);
}

// adapted_linear: the host's composition is the reference.
struct LinearCase {
  std::vector<std::vector<std::vector<int64_t>>> groups;  // of each layer's terms
  bool every_row, bias;
  bool row_weights = false;
};
const std::vector<LinearCase> kLinearCases{
    {{{{1}}, {{1}}, {{1}}}, false, false},  // q, k, v of one modality
    {{{{0}}}, true, true},                  // an open gate
    {{{{1}, {1, 2}}, {}, {{2}}},
     false,
     true},                                // two terms on one layer, one of them on two modalities; a layer without any
    {{{{0, 1, 2}}, {{2}}}, false, false},  // text adapted too
    {{{{1}, {1, 2}}, {}, {{2}}}, false, true, true},
    {{{{0}, {0}}}, true, false, true},
};

std::vector<at::Tensor> adapted(const LinearCase& c, at::ScalarType dtype, at::ScalarType masters, bool use_all) {
  const at::Tensor x = randn({40, 16}, 1, dtype).set_requires_grad(true);
  std::vector<at::Tensor> leaves{x};
  const at::Tensor modality = at::arange(40) * 3 % 7 % 3;
  std::vector<at::Tensor> rows;
  for (int64_t m = 0; m < 3; ++m) rows.push_back(c.every_row ? at::Tensor() : at::nonzero(modality == m).view({-1}));
  std::vector<AdaptedLinear> layers;
  uint64_t seed = 2;
  for (const auto& terms : c.groups) {
    const int64_t out = 8 + 16 * int64_t(layers.size());
    layers.push_back(
        {{randn({out, 16}, seed++, dtype) * 0.3, c.bias ? randn({out}, seed++, dtype) : at::Tensor()}, {}});
    for (const auto& groups : terms) {
      const int64_t rank = 3 + int64_t(seed % 3);
      leaves.push_back((randn({rank, 16}, seed++) * 0.3).to(masters).set_requires_grad(true));
      leaves.push_back((randn({out, rank}, seed++) * 0.3).to(masters).set_requires_grad(true));
      layers.back().terms.push_back({leaves[leaves.size() - 2], leaves.back(), 1.5, groups});
      if (!c.row_weights) continue;
      leaves.push_back(randn({40}, seed++).set_requires_grad(true));
      layers.back().terms.back().weight_X = leaves.back();
    }
  }
  std::vector<at::Tensor> out = adapted_linear(x, layers, rows);
  at::Tensor objective = at::zeros({}, at::kFloat);
  for (size_t i = 0; i < out.size(); ++i)
    if (use_all || i == 0) objective = objective + (out[i].to(at::kFloat) * randn(out[i].sizes(), 90 + i)).sum();
  objective.backward();
  for (at::Tensor& y : out) y = y.detach();
  for (const at::Tensor& leaf : leaves) out.push_back(leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf));
  return out;
}

TEST(EmulatedDevice, AdaptedLinearEqualsTheHosts) {
  for (const auto& c : kLinearCases)
    for (const bool use_all : {true, false})
      for (const auto& [dtype, masters] : {std::pair(at::kFloat, at::kFloat), std::pair(at::kBFloat16, at::kFloat),
                                           std::pair(at::kBFloat16, at::kBFloat16)}) {
        const auto exact = adapted(c, at::kFloat, at::kFloat, use_all), host = adapted(c, dtype, masters, use_all);
        const Emulation on;
        const auto device = adapted(c, dtype, masters, use_all);
        ASSERT_EQ(device.size(), host.size());
        for (size_t i = 0; i < host.size(); ++i) {
          EXPECT_EQ(device[i].scalar_type(), host[i].scalar_type());
          const double error = distance(device[i], exact[i]), scale = 1 + largest(exact[i]);
          if (dtype == at::kFloat)
            EXPECT_LT(error, 1e-5 * scale) << "result " << i;
          else
            EXPECT_LE(error, 2 * distance(host[i], exact[i]) + 4e-3 * scale) << "result " << i;
        }
      }
}

TEST(EmulatedDevice, AdaptedLinearsGradientsAreThoseOfFiniteDifferences) {
  const Emulation on;
  const LinearCase& c = kLinearCases[2];
  const at::Tensor x = randn({40, 16}, 1), w = randn({8, 16}, 2), seeds = randn({40, 8}, 3);
  std::vector<at::Tensor> rows;
  for (int64_t m = 0; m < 3; ++m) rows.push_back(at::nonzero(at::arange(40) * 3 % 7 % 3 == m).view({-1}));
  std::vector<at::Tensor> leaves{
      x, randn({3, 16}, 4), randn({8, 3}, 5), randn({4, 16}, 6), randn({8, 4}, 7), randn({40}, 8)};
  const auto objective = [&] {
    return (adapted_linear(leaves[0],
                           {{{w, {}},
                             {{leaves[1], leaves[2], 1.5, c.groups[0][0]},
                              {leaves[3], leaves[4], 0.5, c.groups[0][1], leaves[5]}}}},
                           rows)[0] *
            seeds)
        .sum();
  };
  for (auto& leaf : leaves) leaf.set_requires_grad(true);
  objective().backward();
  const at::NoGradGuard no_grad;
  for (auto& leaf : leaves) {
    const at::Tensor direction = randn(leaf.sizes(), 9), before = leaf.detach().clone();
    const double h = 1e-2, expected = (leaf.grad() * direction).sum().item<double>();
    leaf.copy_(before + h * direction);
    const double up = objective().item<double>();
    leaf.copy_(before - h * direction);
    const double down = objective().item<double>();
    leaf.copy_(before);
    EXPECT_NEAR(
        (up - down) / (2 * h), expected,
        2e-3 * (1 + std::abs(expected)));  // the objective is linear in each leaf: only float32's rounding is left
  }
}

TEST(EmulatedDevice, AdaptedLinearKeepsTheBitsOfRowsOnWhichNothingActs) {
  const Emulation on;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = randn({20, 16}, 1, dtype), w = randn({24, 16}, 2, dtype),
                     rows = at::tensor({3, 4, 19}, at::kLong);
    const std::vector<at::Tensor> groups{at::Tensor(), rows};
    const at::Tensor y = adapted_linear(x, {{{w, {}}, {{randn({2, 16}, 3), randn({24, 2}, 4), 1.5, {1}}}}}, groups)[0],
                     base = frozen_linear(x, {{w, {}}})[0];
    for (int64_t t = 0; t < 20; ++t) EXPECT_EQ(at::equal(y[t], base[t]), t != 3 && t != 4 && t != 19) << "row " << t;
  }
}

TEST(EmulatedDevice, AdaptedLinearLaunchesLessThanItsComposition) {
  const at::Tensor x = randn({40, 16}, 1, at::kBFloat16), w = randn({24, 16}, 2, at::kBFloat16), A = randn({4, 16}, 3),
                   B = randn({24, 4}, 4), rows = at::arange(3, 30);
  const AdaptedLinear layer{{w, {}}, {{A, B, 1.5, {0}}}};
  const auto count = [&] { return launches([&] { adapted_linear(x, {layer, layer, layer}, {rows}); }); };
  const int64_t host = count();
  const Emulation on;
  EXPECT_LT(3 * count(), 2 * host) << "one thin product for all, no scaling, sums in place; all casts at once";
}

}  // namespace
}  // namespace moegraft::kernels::cuda

#endif
