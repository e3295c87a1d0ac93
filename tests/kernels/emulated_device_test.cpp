// The public operations' device branches (norm.cpp, route.cpp, cross_entropy.cpp, moe_ffn.cpp) with the device emulated on the host.
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
  const at::Tensor places = at::randint(-1, 40, {23, 4}, at::make_generator<at::CPUGeneratorImpl>(uint64_t{3}), at::kInt);
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
  const Routed r = Host::route_forward(randn({50, 8}, 1), 2, true);
  const at::Tensor sums = at::zeros({2, 19}, at::kDouble), modality = at::arange(50, at::kLong) % 2;
  const auto count = [&] { return launches([&] { kernels::add_routing_sums(sums, r.probs_TE, r.ids_TK, modality); }); };
  const int64_t host = count();
  const Emulation on;
  EXPECT_EQ(count(), 0) << "of the library; the host needs " << host;
  EXPECT_GT(host, 10);
}

}  // namespace
}  // namespace moegraft::kernels::cuda

#endif
