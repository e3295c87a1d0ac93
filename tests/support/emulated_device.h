#pragma once
// A device emulated on the host: defines what the stubs of a build without CUDA define, so that the linker takes this instead, over functors that run lane by
// lane. Include in one file of a test program, in builds without CUDA.

#include "kernels/cuda/host_run.h"
#include "kernels/cuda/moe_body.h"
#include "kernels/moe.h"
#include "emulation.h"

namespace moegraft::kernels {

bool moe_cuda_runs_on(int) { return emulated; }
bool moe_cuda_fits(int64_t, int64_t, int64_t) { return true; }
bool moe_cuda_serves(const MoeProblem& p) { return emulated && p.x_XD.scalar_type() != at::kDouble && !p.weights.gate_EFD.defined(); }
MoeForward moe_forward_cuda(const MoeProblem& p, bool save, bool keep_hidden) {
  ++emulated_layers;
  return cuda::MoeLayer<cuda::OnHost>(p).forward(save, keep_hidden);
}
MoeGradients moe_backward_cuda(const MoeProblem& p, const std::vector<at::Tensor>& saved, const at::Tensor& dout, const MoeNeeds& needs) {
  ++emulated_layers;
  return cuda::MoeLayer<cuda::OnHost>(p).backward(saved, dout, needs);
}

namespace cuda {

using Device = Ops<OnHost>;

bool holds(const at::Tensor&) { return emulated; }

}  // namespace cuda
}  // namespace moegraft::kernels

#include "emulated_graph.h"
#include "kernels/cuda/ops_exports.h"
