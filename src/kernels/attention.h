#pragma once
// Packed attention behind its autograd function. Sequence i has queries cu_q[i]..cu_q[i+1] and keys
// cu_kv[i]..cu_kv[i+1]; its queries are the last of its keys, so query j sits at position keys - queries + j and sees
// the keys up to itself, at most `window` of them when window > 0.

#include <vector>

#include "libtorch.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

struct AttentionProblem {
  at::Tensor q_THC, k_SGC, v_SGC;  // contiguous, but for attention_differentiable_aten
  std::vector<int64_t> cu_q, cu_kv;
  int64_t window = 0;
  double scale = 1.0;
  DeviceLengths on_device = {};  // cu_q and cu_kv beside the tensors; undefined: not given

  int64_t heads() const { return q_THC.size(1); }
  int64_t groups() const { return k_SGC.size(1); }
  int64_t head_dim() const { return q_THC.size(2); }
  int64_t num_sequences() const { return int64_t(cu_q.size()) - 1; }
};
struct AttentionOutput {
  at::Tensor out_THC, lse_TH;          // log-sum-exp of the scaled scores, float32
  std::vector<at::Tensor> extra = {};  // what the same implementation's backward wants beside them
};
struct AttentionGradients {
  at::Tensor q_THC, k_SGC, v_SGC;
};

// cached_attention and step_attention of ops.h.
struct CachedAttention {
  const at::Tensor &q_THC, &keys_BSGC, &values_BSGC;
  const std::vector<int64_t>&cu_seqlens, &kv_lengths;
  int64_t window;
  double scale;

  int64_t num_sequences() const { return int64_t(cu_seqlens.size()) - 1; }
};
struct StepAttention {
  const at::Tensor &q_BHC, &keys_BSGC, &values_BSGC, &lengths_B;
  int64_t window;
  double scale;
};

// The library's functions (attention_aten.cpp), on a CPU, and differentiated by the library on whatever device.
AttentionOutput attention_forward_aten(const AttentionProblem& problem);
AttentionGradients attention_backward_aten(const AttentionProblem& problem, const AttentionOutput& output,
                                           const at::Tensor& dout_THC);
at::Tensor attention_differentiable_aten(const AttentionProblem& problem);
at::Tensor attention_cached_aten(const CachedAttention& call);
at::Tensor attention_step_aten(const StepAttention& call);

// CPU: one query for each of a cache's first sequences, and queries of any number by block products
// (attention_cache.cpp). float32 and bfloat16.
bool attention_decode_serves(const CachedAttention& call);
at::Tensor attention_decode(const CachedAttention& call);
bool attention_cached_blocks_serve(const CachedAttention& call);
at::Tensor attention_cached_blocks(const CachedAttention& call);

// CPU block products (attention_blocks.cpp).
bool attention_blocks_serve(const AttentionProblem& problem);
AttentionOutput attention_forward_blocks(const AttentionProblem& problem);
AttentionGradients attention_backward_blocks(const AttentionProblem& problem, const AttentionOutput& output,
                                             const at::Tensor& dout_THC);

// The library's flash kernels on a GPU from Ampere on: bfloat16 or half, heads of a multiple of 8 up to 256
// (cuda/attention.cpp). Never waits for the device.
bool attention_cuda_serves(const at::Tensor& q_THC);
AttentionOutput attention_forward_cuda(const AttentionProblem& problem);
// Deterministic: the flash kernel's other form adds to dq with float atomics.
AttentionGradients attention_backward_cuda(const AttentionProblem& problem, const AttentionOutput& output,
                                           const at::Tensor& dout_THC);
// cached_attention of ops.h.
at::Tensor attention_cached_cuda(const at::Tensor& q_THC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC,
                                 const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& kv_lengths,
                                 int64_t window, double scale);
// step_attention of ops.h.
at::Tensor attention_step_cuda(const at::Tensor& q_BHC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC,
                               const at::Tensor& lengths_B, int64_t window, double scale);

}  // namespace moegraft::kernels
