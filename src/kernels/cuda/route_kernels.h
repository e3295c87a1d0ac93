#pragma once
// Softmax over the experts, the top k of them, and their weights.

#include "team.h"

namespace moegraft::kernels::cuda {

// One warp per token. logits float32 [T, E] -> probs [T, E], ids [T, K] in falling order of probability (of equal ones
// the lower index first), weights [T, K] = the probabilities, divided by their sum when `renormalise`. A row without K
// comparable values (NaN) fills up with the indices k, so that ids always lie in range.
struct RouteForward {
  static constexpr int kLanes = 32;
  const float* logits;
  float* probs;
  int64_t* ids;
  float* weights;
  int64_t num_experts, top_k;
  bool renormalise;

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t token, const Team& team) const {
    const float* in = logits + token * num_experts;
    float* out = probs + token * num_experts;
    const float largest = team.max([&](int lane) {
      float m = -INFINITY;
      for (int64_t e = lane; e < num_experts; e += kLanes) m = in[e] > m ? in[e] : m;
      return m;
    });
    const float total = team.sum([&](int lane) {
      float part = 0;
      for (int64_t e = lane; e < num_experts; e += kLanes) part += expf(in[e] - largest);
      return part;
    });
    team.each([&](int lane) {
      for (int64_t e = lane; e < num_experts; e += kLanes) out[e] = expf(in[e] - largest) / total;
    });
    Candidate last{INFINITY, -1};
    float chosen = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      // What comes after `last` in the order: a smaller value, or the same one at a higher index. Each lane reads only
      // what it wrote.
      const Candidate next = team.best([&](int lane) {
        Candidate found{0, -1};
        for (int64_t e = lane; e < num_experts; e += kLanes) {
          const float p = out[e];
          if (p < last.value || (p == last.value && int32_t(e) > last.index))
            found = better(found, Candidate{p, int32_t(e)});
        }
        return found;
      });
      const int64_t id = next.index < 0 ? k : next.index;
      const float weight = next.index < 0 ? NAN : next.value;
      if (next.index >= 0) last = next;
      chosen += weight;
      team.each([&](int lane) {
        if (lane != 0) return;
        ids[token * top_k + k] = id;
        weights[token * top_k + k] = weight;
      });
    }
    if (renormalise)
      team.each([&](int lane) {
        if (lane != 0) return;  // the lane that wrote them
        for (int64_t k = 0; k < top_k; ++k) weights[token * top_k + k] /= chosen;
      });
  }
};

// One warp per token: dlogits from dweights [T, K] and dprobs [T, E], either null. Weights as forward left them.
struct RouteBackward {
  static constexpr int kLanes = 32;
  const float* probs;
  const int64_t* ids;
  const float *weights, *dweights, *dprobs;
  float* dlogits;
  int64_t num_experts, top_k;
  bool renormalise;

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t token, const Team& team) const {
    const float* p = probs + token * num_experts;
    const int64_t* id = ids + token * top_k;
    const float *w = weights + token * top_k, *dw = dweights ? dweights + token * top_k : nullptr;
    // w_k = p_k / s: the gradient of p_k is (dw_k - sum_j dw_j w_j) / s.
    float chosen = 1, mean = 0;
    if (dw && renormalise) {
      chosen = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        chosen += p[id[k]];
        mean += dw[k] * w[k];
      }
    }
    const auto gradient = [&](int64_t e) {
      float d = dprobs ? dprobs[token * num_experts + e] : 0.0f;
      if (dw)
        for (int64_t k = 0; k < top_k; ++k)
          if (id[k] == e) d += (dw[k] - mean) / chosen;
      return d;
    };
    const float dot = team.sum([&](int lane) {
      float part = 0;
      for (int64_t e = lane; e < num_experts; e += kLanes) part += p[e] * gradient(e);
      return part;
    });
    team.each([&](int lane) {
      for (int64_t e = lane; e < num_experts; e += kLanes)
        dlogits[token * num_experts + e] = p[e] * (gradient(e) - dot);
    });
  }
};

}  // namespace moegraft::kernels::cuda
