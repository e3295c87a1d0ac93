#pragma once
// The decoder's fused operations. All are differentiable and run on the device of their inputs; results do not depend
// on thread timing. Letters as in model/spec.h; R routed rows = T*K, X any number of rows.

#include <torch/types.h>

#include <functional>
#include <memory>
#include <vector>

#include "moegraft/kernels/expert_layout.h"
#include "moegraft/kernels/matrix.h"

namespace moegraft::kernels {

class ExpertPanels;  // a layer's frozen experts laid out for the CPU's products (src/kernels/cpu/panels.h)

// y = w * x / sqrt(mean(x^2) + eps) over the last dimension; statistics in float32, result in x's dtype. w may require
// grad.
at::Tensor rms_norm(const at::Tensor& x_XD, const at::Tensor& weight_D, double eps);

// Rotates the two halves of each head: (a, b) -> (a cos - b sin, b cos + a sin) (the "rotate_half" convention). cos,
// sin float32 [T, C/2].
at::Tensor rotary(const at::Tensor& x_THC, const at::Tensor& cos_TC, const at::Tensor& sin_TC);

// Queries or keys of a layer before attention.
struct HeadRows {
  at::Tensor x_TX;  // [T, H*C]
  int64_t num_heads;
  at::Tensor norm;  // undefined: none; [C]: of each head alone; [H*C]: of a token's heads together
};
// rms_norm, where there is one, values cut to [-clip, clip] when clip > 0, and then rotary: [T, H, C] of each. On the
// CPU one pass makes all of them (not with clip).
std::vector<at::Tensor> norm_rotary(const std::vector<HeadRows>& rows, const at::Tensor& cos_TC,
                                    const at::Tensor& sin_TC, double eps, double clip = 0);

// y_i = x W_i^T + b_i for weights that share their input. W [N, K] frozen or a leaf; packed ones run in one pass over
// x.
struct FrozenLinearWeight {
  Matrix weight_NK;
  at::Tensor bias_N;  // undefined: none
};
std::vector<at::Tensor> frozen_linear(const at::Tensor& x_XK, const std::vector<FrozenLinearWeight>& weights);

// One low-rank term of a linear layer: y += scale * w (x A^T) B^T on the rows of its groups, w the row's weight.
struct LinearLowRank {
  at::Tensor A_PK, B_NP;  // float32 (masters) or the compute dtype
  double scale = 1.0;
  std::vector<int64_t> groups;  // in rows_of_group, none of them empty
  at::Tensor weight_X{};        // float32, of every row of x, differentiable; undefined: ones
};
struct AdaptedLinear {
  FrozenLinearWeight base;
  std::vector<LinearLowRank> terms;
};
// frozen_linear with terms. rows_of_group: each group's rows, int64, each at most once; undefined: every row. A row on
// which no term acts has frozen_linear's bits. Differentiable in x, the factors and the rows' weights (and in the
// base's weights where they are leaves).
std::vector<at::Tensor> adapted_linear(const at::Tensor& x_XK, const std::vector<AdaptedLinear>& layers,
                                       const std::vector<at::Tensor>& rows_of_group);

// Whether rows of a frozen product on the CPU get the same bits whatever rows are beside them: tried on this machine's
// own micro-kernels, of every height and width, at each of these depths. False without panels (has none, portable).
bool rows_stand_alone(at::ScalarType dtype, const std::vector<int64_t>& depths);

// x' = x + delta (delta undefined: x' = x); y = w * x' / sqrt(mean(x'^2) + eps), rounded to `dtype`, and y in float32
// when `also_float` is given. The residual stream x is float32, delta in the compute dtype; w frozen or a leaf.
struct ResidualNorm {
  at::Tensor x_XD, y_XD, y_float_XD;
};
ResidualNorm residual_norm(const at::Tensor& x_XD, const at::Tensor& delta_XD, const at::Tensor& weight_D, double eps,
                           at::ScalarType dtype, bool also_float = false);

// Causal attention inside each packed sequence, grouped queries (H % G == 0). Sequence i has queries cu_q[i]..cu_q[i+1]
// and keys cu_kv[i]..cu_kv[i+1]; its queries are the last of its keys (cu_q == cu_kv: plain self-attention). window >
// 0: a query sees the last `window` keys up to itself. on_device: the same lengths beside the tensors (int32), for
// whoever has them there; a GPU otherwise gets a copy in every call.
struct DeviceLengths {
  at::Tensor cu_q, cu_kv;
};
at::Tensor packed_attention(const at::Tensor& q_THC, const at::Tensor& k_SGC, const at::Tensor& v_SGC,
                            const std::vector<int64_t>& cu_q, const std::vector<int64_t>& cu_kv, int64_t window,
                            double scale, const DeviceLengths& on_device = {});

// Sequence i of the result: the rows of `past` (constants), then those of `now`. Row counts by cu_past, cu_now.
// Differentiable in `now`.
at::Tensor join_sequences(const at::Tensor& past, const at::Tensor& now, const std::vector<int64_t>& cu_past,
                          const std::vector<int64_t>& cu_now);

// Inference with a cache: sequence i's queries are the last of its kv_lengths[i] cached positions. keys, values [B,
// S_max, G, C].
at::Tensor cached_attention(const at::Tensor& q_THC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC,
                            const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& kv_lengths,
                            int64_t window, double scale);

// The same for one query of each of the cache's first B sequences, with the lengths before it read on the device (int64
// [B]): one set of launches for all lengths. Cells beyond them must hold finite numbers.
at::Tensor step_attention(const at::Tensor& q_BHC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC,
                          const at::Tensor& lengths_B, int64_t window, double scale);

// Rows of the experts, sorted by (expert, group), stable in token order. group_T: values in [0, num_groups), undefined
// for one group. Everything lies on the tokens' device; nothing here waits for it. A slot whose expert is elsewhere
// (topk id -1: expert parallelism) has no row: it adds nothing to its token, and the gradient of its routing weight is
// 0.
struct Dispatch {
  int64_t num_experts = 0, num_groups = 1, top_k = 0;
  at::Tensor token_of_row_R;  // int32
  at::Tensor row_of_slot_TK;  // int32, inverse: slot (t, k) lies in this row; -1: in none
  at::Tensor offsets;         // int32 [E*num_groups + 1], begin of (e, g) at offsets[e*num_groups + g]

  int64_t num_rows() const { return token_of_row_R.size(0); }
  std::vector<int64_t> host_offsets() const;  // waits for the device when the tokens are on one
};
// num_rows: how many slots have a row, for whoever knows that some have none (without it a device would have to be
// asked); -1: all.
Dispatch make_dispatch(const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T,
                       int64_t num_groups, int64_t num_rows = -1);
at::Tensor permute(const at::Tensor& x_TD, const Dispatch& dispatch);  // -> [R, D]; no gradient
// y[t] = the sum of rows[row_of[t, k]] in the order of k, summed in float32 (float64: in itself), -1: none. rows_RN of
// any floating dtype, row_of_TK int32
// -> [T, N] in the rows' dtype. No gradient; waits for nothing.
at::Tensor sum_rows(const at::Tensor& rows_RN, const at::Tensor& row_of_TK);

// One low-rank term on an expert site: y += scale * w (x A_e^T) B_e^T on rows whose group has acts[group], w the weight
// of the row's token.
struct ExpertLowRank {
  at::Tensor A_EPX, B_EXP;  // float32 (masters) or the compute dtype
  double scale = 1.0;
  std::vector<bool> acts;  // [num_groups]
  at::Tensor weight_X{};   // float32, of every row of x_XD, differentiable; undefined: ones. With it a device's experts
                           // run through ATen, which waits for the device
};
// Frozen experts: one [F,D] / [D,F] matrix each; quantised ones: panels alone. Trained ones: stacked leaves, whose
// gradients are then filled.
struct ExpertFfnWeights {
  ExpertMatrices gate_FD, up_FD, down_DF;
  at::Tensor gate_EFD, up_EFD, down_EDF;
  std::shared_ptr<ExpertPanels> panels;  // null: the weights change, or nobody made them
  int64_t num_experts() const;
  int64_t expert_width() const;
};
// Null where they would not serve: trained weights, other devices, a CPU without the micro-kernel. Panels are filled at
// first use (forward ones, and backward ones when something is differentiated) and take the weights' size each. lean:
// experts keep the forward layout alone where one_layout_serves: the other is then turned from it panel by panel when
// it is needed, 8-12 % of a step in float32 for half the memory. On AMX it does not serve bf16, whose products take
// little longer than the turning.
bool one_layout_serves(at::ScalarType dtype);
std::shared_ptr<ExpertPanels> make_expert_panels(const ExpertFfnWeights& weights, OnPacked on_packed = nullptr,
                                                 bool lean = false);
// As quantise() of each matrix: the lists become panels, or lists of the format's values.
void quantise_experts(ExpertFfnWeights& weights, WeightFormat format);
int64_t stored_bytes(const ExpertPanels& quantised);

// Factors as products want them, kept from call to call by whoever knows that their values do not change meanwhile
// (decoding lays them out hundreds of times otherwise). Of one layer, for one call at a time; without effect where
// gradients are recorded.
class FactorCache;
std::shared_ptr<FactorCache> make_factor_cache();

struct ExpertFfnAdapters {
  std::vector<ExpertLowRank> gate, up, down;
  std::shared_ptr<FactorCache> cache = nullptr;
  bool empty() const { return gate.empty() && up.empty() && down.empty(); }
};
// The experts of one layer on the rows they hold: out[x] = sum_k weights[x,k] * FFN_e(x,k)(x), FFN_e(x) =
// down(silu(gate x) * up x). x_XD in the compute dtype, weights_XK float32, both differentiable. Never builds a full
// weight update or a permuted copy that outlives the call; saves gate and up outputs and the thin products; the
// gradient of a routing weight is <h, dh>, so the experts' outputs are not kept either (SonicMoE, arXiv:2512.14080, has
// the same identity). No gradients for frozen weights; an expert without rows costs nothing and gets exactly zero
// gradients for its factors. hidden_RF, when given, receives silu(gate)*up of the sorted rows (calibration).
at::Tensor moe_ffn(const at::Tensor& x_XD, const at::Tensor& weights_XK, const Dispatch& dispatch,
                   const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters, at::Tensor* hidden_RF = nullptr);
// The same, written plainly with autograd: what the fused ones are tested against.
at::Tensor moe_ffn_reference(const at::Tensor& x_XD, const at::Tensor& weights_XK, const Dispatch& dispatch,
                             const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters);

// Sum over rows of scale * (logsumexp(h W^T) - (h W^T)[target]); gradients for h, and for W when it requires grad.
// Chunked: the [X, V] logits are never held whole. W may be a float32 master under a lower compute dtype. Returns a
// float32 scalar.
at::Tensor linear_cross_entropy(const at::Tensor& h_XD, const Matrix& weight_VD, const at::Tensor& targets_X,
                                double scale);
// Rows of its logits that it holds at a time, of `rows` in all.
int64_t cross_entropy_chunk(int64_t rows, int64_t classes, bool on_cuda);

}  // namespace moegraft::kernels
