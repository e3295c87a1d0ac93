#pragma once
// Sums over a router's decisions, by modality.

#include "team.h"

namespace moegraft::kernels::cuda {

constexpr int64_t kRoutingTokens = 32;  // that one partial sum covers

// One team per chunk of tokens: partial [chunks, M, 2E + 3], as add_routing_sums (route.h) lays a modality's sums out.
// A lane owns every kLanes-th expert.
struct RoutingPartial {
  static constexpr int kLanes = 128;
  const float* probs;
  const int64_t *ids, *modality;  // modality null: all 0
  float* partial;
  int64_t tokens, num_experts, top_k, num_modalities;
  float entropy_scale;

  MOEGRAFT_HD bool is_of(int64_t token, int64_t m) const { return modality ? modality[token] == m : m == 0; }
  // Largest minus second largest probability: ids are in falling order, and where only one was chosen the second is
  // looked for.
  MOEGRAFT_HD float margin(int64_t token) const {
    const float* p = probs + token * num_experts;
    const int64_t* id = ids + token * top_k;
    if (num_experts == 1) return p[0];
    if (top_k > 1) return p[id[0]] - p[id[1]];
    float second = -INFINITY;
    for (int64_t e = 0; e < num_experts; ++e) second = e != id[0] && p[e] > second ? p[e] : second;
    return p[id[0]] - second;
  }

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t chunk, const Team& team) const {
    const int64_t begin = chunk * kRoutingTokens,
                  end = begin + kRoutingTokens < tokens ? begin + kRoutingTokens : tokens;
    for (int64_t m = 0; m < num_modalities; ++m) {
      float* out = partial + (chunk * num_modalities + m) * (2 * num_experts + 3);
      const float entropy = team.sum([&](int lane) {
        float sum = 0;
        for (int64_t e = lane; e < num_experts; e += kLanes) {
          float chosen = 0, mass = 0;
          for (int64_t t = begin; t < end; ++t) {
            if (!is_of(t, m)) continue;
            const float p = probs[t * num_experts + e];
            mass += p;
            sum -= p > 0 ? p * logf(p) : p;  // 0, or NaN
            for (int64_t k = 0; k < top_k; ++k) chosen += ids[t * top_k + k] == e ? 1.0f : 0.0f;
          }
          out[e] = chosen;
          out[num_experts + e] = mass;
        }
        return sum;
      });
      const float count =
          team.sum([&](int lane) { return begin + lane < end && is_of(begin + lane, m) ? 1.0f : 0.0f; });
      const float margins = team.sum(
          [&](int lane) { return begin + lane < end && is_of(begin + lane, m) ? margin(begin + lane) : 0.0f; });
      team.each([&](int lane) {
        if (lane != 0) return;
        out[2 * num_experts] = count;
        out[2 * num_experts + 1] = entropy * entropy_scale;
        out[2 * num_experts + 2] = margins;
      });
    }
  }
  static_assert(kLanes >= kRoutingTokens, "a lane for each token of a chunk");
};

// One thread per sum: the chunks in their order, in double.
struct AddRoutingPartials {
  const float* partial;
  double* sums;
  int64_t chunks, count;

  MOEGRAFT_HD void operator()(int64_t i) const {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += static_cast<double>(partial[c * count + i]);
    sums[i] += total;
  }
};

}  // namespace moegraft::kernels::cuda
