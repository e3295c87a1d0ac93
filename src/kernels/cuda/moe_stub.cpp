// A build without CUDA serves no GPU.
#include "kernels/moe.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {

bool moe_cuda_serves(const MoeProblem&) { return false; }
MoeForward moe_forward_cuda(const MoeProblem&, bool, bool) {
  MOEGRAFT_INVARIANT(moe_cuda_serves(MoeProblem{}), "compiled without CUDA");
  return {};
}
MoeGradients moe_backward_cuda(const MoeProblem&, const std::vector<at::Tensor>&, const at::Tensor&, const MoeNeeds&) {
  MOEGRAFT_INVARIANT(moe_cuda_serves(MoeProblem{}), "compiled without CUDA");
  return {};
}

}  // namespace moegraft::kernels
