// Linked where CUDA is off.

#include "../moe.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

[[noreturn]] void missing() {
  fail<InvariantError>("the device's experts were called in a build without CUDA: ask moe_cuda_serves() first");
}

}  // namespace

bool moe_cuda_serves(const MoeProblem&) { return false; }
bool moe_cuda_runs_on(int) { return false; }
bool moe_cuda_fits(int64_t, int64_t, int64_t) { return false; }
MoeForward moe_forward_cuda(const MoeProblem&, bool, bool) { missing(); }
MoeGradients moe_backward_cuda(const MoeProblem&, const std::vector<at::Tensor>&, const at::Tensor&, const MoeNeeds&) {
  missing();
}

}  // namespace moegraft::kernels
