#pragma once
// A device emulated on the host: defines what the stubs of a build without CUDA define, so that the linker takes this
// instead, over functors that run lane by lane. Include in one file of a test program, in builds without CUDA.

#include <torch/csrc/autograd/autograd.h>

#include "emulation.h"
#include "kernels/attention.h"
#include "kernels/cuda/host_run.h"
#include "kernels/cuda/moe_body.h"
#include "kernels/moe.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {

bool moe_cuda_runs_on(int) { return emulated; }
bool moe_cuda_fits(int64_t, int64_t, int64_t) { return true; }
bool moe_cuda_serves(const MoeProblem& p) {
  return emulated && p.x_XD.scalar_type() != at::kDouble && !p.weights.gate_EFD.defined();
}
MoeForward moe_forward_cuda(const MoeProblem& p, bool save, bool keep_hidden) {
  ++emulated_layers;
  return cuda::MoeLayer<cuda::OnHost>(p).forward(save, keep_hidden);
}
MoeGradients moe_backward_cuda(const MoeProblem& p, const std::vector<at::Tensor>& saved, const at::Tensor& dout,
                               const MoeNeeds& needs) {
  ++emulated_layers;
  return cuda::MoeLayer<cuda::OnHost>(p).backward(saved, dout, needs);
}

// Attention written plainly, cut by the lengths on the device where they are given, as the library's kernel is.
inline at::Tensor plain_packed_attention(const AttentionProblem& p) {
  const auto lengths = [](const at::Tensor& on_device, const std::vector<int64_t>& on_host) {
    if (!on_device.defined()) return on_host;
    std::vector<int64_t> out;
    for (int64_t i = 0; i < on_device.numel(); ++i) out.push_back(on_device[i].item<int>());
    return out;
  };
  const std::vector<int64_t> cu_q = lengths(p.on_device.cu_q, p.cu_q), cu_kv = lengths(p.on_device.cu_kv, p.cu_kv);
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i + 1 < cu_q.size(); ++i) {
    const int64_t queries = cu_q[i + 1] - cu_q[i], keys = cu_kv[i + 1] - cu_kv[i];
    const auto heads = [&](const at::Tensor& x, int64_t begin, int64_t count) {
      return x.narrow(0, begin, count).transpose(0, 1).repeat_interleave(p.heads() / x.size(1), 0);
    };
    const at::Tensor past = at::arange(keys - queries, keys).unsqueeze(1) -
                            at::arange(keys).unsqueeze(0);  // how far a key lies behind a query
    const at::Tensor hidden = p.window > 0 ? (past < 0) | (past >= p.window) : past < 0;
    const at::Tensor scores =
        at::matmul(heads(p.q_THC, cu_q[i], queries), heads(p.k_SGC, cu_kv[i], keys).transpose(1, 2)).to(at::kFloat) *
        p.scale;
    const at::Tensor weights = at::softmax(scores.masked_fill(hidden, -INFINITY), -1).to(p.q_THC.scalar_type());
    parts.push_back(at::matmul(weights, heads(p.v_SGC, cu_kv[i], keys)).transpose(0, 1));
  }
  return at::cat(parts);
}
bool attention_cuda_serves(const at::Tensor& q) {
  return emulated && emulated_attention && q.scalar_type() != at::kDouble;
}
AttentionOutput attention_forward_cuda(const AttentionProblem& p) {
  attention_lengths.push_back(p.on_device);
  return {plain_packed_attention(p), at::empty({0}), {}};
}
AttentionGradients attention_backward_cuda(const AttentionProblem& p, const AttentionOutput&, const at::Tensor& dout) {
  attention_lengths.push_back(p.on_device);
  AttentionProblem again = p;
  for (at::Tensor* t : {&again.q_THC, &again.k_SGC, &again.v_SGC}) *t = t->detach().set_requires_grad(true);
  const at::AutoGradMode on(true);
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();  // the caller is below autograd
  const c10::impl::ForceDispatchKeyGuard recorded(keys.included_,
                                                  keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  const auto g =
      torch::autograd::grad({plain_packed_attention(again)}, {again.q_THC, again.k_SGC, again.v_SGC}, {dout});
  return {g[0], g[1], g[2]};
}
at::Tensor attention_cached_cuda(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::vector<int64_t>&,
                                 const std::vector<int64_t>&, int64_t, double) {
  fail<InvariantError>("the emulated device has no attention over a cache");
}
at::Tensor attention_step_cuda(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                               double) {
  fail<InvariantError>("the emulated device has no attention over a cache");
}

namespace cuda {

using Device = Ops<OnHost>;

bool holds(const at::Tensor&) { return emulated; }

}  // namespace cuda
}  // namespace moegraft::kernels

#include "emulated_graph.h"
#include "kernels/cuda/ops_exports.h"
