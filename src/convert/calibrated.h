#pragma once
// What calibration text says about a layer's FFN: neurons that fire together, and routers that know where.

#include <torch/types.h>

#include <cstdint>

namespace moegraft::convert {

// x_TD: a layer's FFN inputs, float32. Weights as Hugging Face has them: gate and up [N, D], down [D, N].
struct DenseFfn {
  at::Tensor x_TD, gate_ND, up_ND, down_DN;
};

// An FFN's neurons: `shared` that every expert holds, and each expert's own. Sorted within an expert.
struct NeuronGroups {
  at::Tensor shared_S, own_EO;  // int64
  at::Tensor strength_TE;       // what an expert's own neurons add to the output, per token: the sum of |activation| *
                                // |column of down|
};

// The neurons with the largest mean share of the output are shared; the others are clustered evenly by the tokens on
// which they are among the strongest tenth (after CMoE, arXiv:2502.04416, which shares those that are most often among
// the strongest). shared + experts * own = N.
NeuronGroups group_neurons(const DenseFfn& ffn, int64_t experts, int64_t shared, uint64_t seed);

// Rows [experts, D] by ridge regression from inputs to the experts' strengths: the best linear router for them in
// closed form. CMoE's own is a neuron's activation, which is no linear map. Scaled to nearly flat weights, for which
// experts have the factor top_k: the choice is unchanged by it.
at::Tensor analytic_router(const at::Tensor& x_TD, const at::Tensor& strength_TE);

// Rows of balanced k-means centres of the inputs' directions (LLaMA-MoE v2, arXiv:2411.15708), less their mean. Logits
// vary from token to token as much as those of random rows with entries of standard deviation `std`: centres point
// where inputs do, and would make weights uneven.
at::Tensor kmeans_router(const at::Tensor& x_TD, int64_t rows, double std, uint64_t seed);

}  // namespace moegraft::convert
