// The public operations' device branches (norm.cpp, route.cpp, cross_entropy.cpp, moe_ffn.cpp) with the device emulated on the host: this file defines what
// the stubs of a build without CUDA define, so that the linker takes it instead of them, over functors that run lane by lane.
#ifndef MOEGRAFT_HAVE_CUDA

#include "cuda_cases.h"

namespace moegraft::kernels {
namespace {

bool emulated = false;   // while a test says so, CPU tensors count as the device's
int64_t calls = 0;       // layers of experts that went this way

struct Emulation {
  Emulation() { emulated = true; }
  ~Emulation() { emulated = false; }
};

}  // namespace

bool moe_cuda_serves(const MoeProblem& p) { return emulated && p.x_XD.scalar_type() != at::kDouble && !p.weights.gate_EFD.defined(); }
MoeForward moe_forward_cuda(const MoeProblem& p, bool save, bool keep_hidden) {
  ++calls;
  return cuda::MoeLayer<cuda::OnHost>(p).forward(save, keep_hidden);
}
MoeGradients moe_backward_cuda(const MoeProblem& p, const std::vector<at::Tensor>& saved, const at::Tensor& dout, const MoeNeeds& needs) {
  ++calls;
  return cuda::MoeLayer<cuda::OnHost>(p).backward(saved, dout, needs);
}

namespace cuda {

using Device = Ops<OnHost>;

bool available() { return emulated; }
bool serves(const at::Tensor& x) { return emulated && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16); }

}  // namespace cuda
}  // namespace moegraft::kernels

#include "kernels/cuda/ops_exports.h"

namespace moegraft::kernels::cuda {
namespace {

TEST(EmulatedDevice, PublicOperationsEqualTheCpus) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Named host = public_ops(at::kCPU, dtype);
    const int64_t before = calls;
    const Named device = [&] {
      const Emulation on;
      return public_ops(at::kCPU, dtype);
    }();
    EXPECT_EQ(calls - before, 2);
    compare_public_ops(device, host, dtype);
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

}  // namespace
}  // namespace moegraft::kernels::cuda

#endif
