// The experts of one layer on a GPU (moe_stub.cpp where CUDA is off).

#ifdef MOEGRAFT_HAVE_CUDA

#include <c10/core/DeviceGuard.h>

#include "device_run.h"
#include "moe_body.h"

namespace moegraft::kernels {

// Hopper and Blackwell data-centre parts: there at::_grouped_mm is one kernel per product. Elsewhere (and in float32
// anywhere) it copies the offsets to the host and loops over the experts; the ATen path does that more simply.
bool moe_cuda_runs_on(int generation) { return generation == 9 || generation == 10; }

// 1024: the grouped product's limit. Rows of 16 bytes: its tensor copies.
bool moe_cuda_fits(int64_t num_experts, int64_t model_width, int64_t expert_width) {
  return num_experts < 1024 && model_width % 8 == 0 && expert_width % 8 == 0;
}

bool moe_cuda_serves(const MoeProblem& problem) {
  const at::Tensor& x = problem.x_XD;
  if (!x.is_cuda() || x.scalar_type() != at::kBFloat16 || problem.weights.gate_EFD.defined()) return false;
  const auto& gate = problem.weights.gate_FD;
  if (!moe_cuda_runs_on(cuda::device_generation(x.device().index())) || gate.empty() ||
      problem.dispatch.num_groups > cuda::kMaxGroups)
    return false;
  size_t terms = 0;
  for (const auto& site : problem.terms) terms += site.size();
  return terms <= size_t(cuda::kMaxTerms) &&
         moe_cuda_fits(int64_t(gate.size()), problem.model_width(), problem.expert_width()) &&
         gate.front().scalar_type() == at::kBFloat16;
}

MoeForward moe_forward_cuda(const MoeProblem& problem, bool save, bool keep_hidden) {
  const c10::DeviceGuard guard(problem.x_XD.device());
  return cuda::MoeLayer<cuda::OnDevice>(problem).forward(save, keep_hidden);
}

MoeGradients moe_backward_cuda(const MoeProblem& problem, const std::vector<at::Tensor>& saved,
                               const at::Tensor& dout_XD, const MoeNeeds& needs) {
  const c10::DeviceGuard guard(problem.x_XD.device());
  return cuda::MoeLayer<cuda::OnDevice>(problem).backward(saved, dout_XD, needs);
}

}  // namespace moegraft::kernels

#endif  // MOEGRAFT_HAVE_CUDA
