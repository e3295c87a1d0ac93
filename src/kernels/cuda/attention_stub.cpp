// Linked where CUDA is off.

#include "../attention.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

[[noreturn]] void missing() {
  fail<InvariantError>("device attention was called in a build without CUDA: ask attention_cuda_serves() first");
}

}  // namespace

bool attention_cuda_serves(const at::Tensor&) { return false; }
AttentionOutput attention_forward_cuda(const AttentionProblem&) { missing(); }
AttentionGradients attention_backward_cuda(const AttentionProblem&, const AttentionOutput&, const at::Tensor&) {
  missing();
}
at::Tensor attention_cached_cuda(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::vector<int64_t>&,
                                 const std::vector<int64_t>&, int64_t, double) {
  missing();
}
at::Tensor attention_step_cuda(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                               double) {
  missing();
}

}  // namespace moegraft::kernels
