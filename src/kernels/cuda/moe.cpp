// The experts of one layer on a GPU (moe_stub.cpp where CUDA is off).

#ifdef MOEGRAFT_HAVE_CUDA

#include <c10/core/DeviceGuard.h>

#include "device_run.h"
#include "moe_body.h"

namespace moegraft::kernels {

// Hopper and Blackwell data-centre parts: there at::_grouped_mm is one kernel per product. Elsewhere (and in float32 anywhere) it copies the offsets to the
// host and loops over the experts; the ATen path does that more simply.
bool moe_cuda_serves(const MoeProblem& problem) {
  const at::Tensor& x = problem.x_XD;
  if (!x.is_cuda() || x.scalar_type() != at::kBFloat16 || problem.weights.gate_EFD.defined()) return false;
  const int major = cuda::device_generation(x.device().index());
  if (major != 9 && major != 10) return false;
  const auto& gate = problem.weights.gate_FD;
  if (gate.empty() || gate.size() >= 1024 || problem.dispatch.num_groups > cuda::kMaxGroups) return false;  // 1024: the grouped product's limit
  size_t terms = 0;
  for (const auto& site : problem.terms) terms += site.size();
  // Rows of 16 bytes: the tensor copies of the grouped product.
  return terms <= size_t(cuda::kMaxTerms) && problem.model_width() % 8 == 0 && problem.expert_width() % 8 == 0 && gate.front().scalar_type() == at::kBFloat16;
}

MoeForward moe_forward_cuda(const MoeProblem& problem, bool save, bool keep_hidden) {
  const c10::DeviceGuard guard(problem.x_XD.device());
  return cuda::MoeLayer<cuda::OnDevice>(problem).forward(save, keep_hidden);
}

MoeGradients moe_backward_cuda(const MoeProblem& problem, const std::vector<at::Tensor>& saved, const at::Tensor& dout_XD, const MoeNeeds& needs) {
  const c10::DeviceGuard guard(problem.x_XD.device());
  return cuda::MoeLayer<cuda::OnDevice>(problem).backward(saved, dout_XD, needs);
}

}  // namespace moegraft::kernels

#endif  // MOEGRAFT_HAVE_CUDA
