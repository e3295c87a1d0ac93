#pragma once
// Low-rank factors as right operands of block products: per (expert, group) the terms that act there, side by side along the rank.

#include <algorithm>
#include <array>

#include "block_product.h"
#include "moe.h"

namespace moegraft::kernels {

// The terms of each site that act on a group, side by side along the rank.
struct RankSet {
  struct Term {
    int64_t index, first, rank;  // of problem.terms[site]; columns [first, first + rank)
  };
  std::array<std::vector<Term>, kSites> terms;
  std::array<int64_t, kSites> rank{};     // real
  std::array<int64_t, kSites> columns{};  // padded: down's, and gate's and up's together, to whole steps of the micro-kernel
  int64_t gate_up() const { return columns[kGate] + columns[kUp]; }
  bool empty() const { return rank[kGate] + rank[kUp] + rank[kDown] == 0; }
};

template <class T>
RankSet rank_set(const MoeProblem& p, int64_t group) {
  constexpr int64_t step = 16 * kPair<T>;
  RankSet set;
  for (int s = 0; s < kSites; ++s) {
    for (size_t i = 0; i < p.terms[s].size(); ++i) {
      if (!p.terms[s][i].acts[group]) continue;
      const int64_t rank = p.terms[s][i].A_EPX.size(1);
      set.terms[s].push_back({int64_t(i), set.rank[s], rank});
      set.rank[s] += rank;
    }
    set.columns[s] = padded_width(set.rank[s]);
  }
  set.columns[kUp] = round_up(set.gate_up(), step) - set.columns[kGate];
  set.columns[kDown] = round_up(set.columns[kDown], step);
  return set;
}

// By group.
template <class T>
std::vector<RankSet> rank_sets(const MoeProblem& p) {
  std::vector<RankSet> sets;
  for (int64_t m = 0; m < p.dispatch.num_groups; ++m) sets.push_back(rank_set<T>(p, m));
  return sets;
}

// Whether gate's and up's B take both's thin products, with zeros for the other's: a step of the bf16 micro-kernel is 32 deep anyway.
template <class T>
constexpr bool kJointThin = sizeof(T) == 2;

// Factors of one (expert, set) as B operands; scale is folded into B.
template <class T>
struct FactorPanels {
  Panels<T> A_in[2];   // x -> t: forward. [0]: gate and up together; [1]: down
  Panels<T> B_out[3];  // t -> y: forward, per site
  Panels<T> B_in[3];   // dy -> dt: backward, per site
  Panels<T> A_out[2];  // dt -> dx: backward. [0]: gate and up together; [1]: down
};

template <class T>
int64_t factor_elements(const RankSet& s, int64_t D, int64_t F, bool backward) {
  const int64_t gu = s.gate_up(), d = s.columns[kDown];
  if (!backward) return Panels<T>::elements(D, gu) + 2 * Panels<T>::elements(gu, F) + Panels<T>::elements(F, d) + Panels<T>::elements(d, D);
  return Panels<T>::elements(gu, D) + Panels<T>::elements(F, s.columns[kGate]) + Panels<T>::elements(F, s.columns[kUp]) + Panels<T>::elements(d, F) + Panels<T>::elements(D, d);
}

// Concatenated factors of one site and expert, float32: A [columns, in] and scale * B [out, ld], of which this writes `columns` columns; padding zero.
inline void concatenate(const MoeProblem& p, const RankSet& set, int site, int64_t expert, float* A, float* B, int64_t in, int64_t out, int64_t ld) {
  const int64_t columns = set.columns[site], rank = set.rank[site];
  std::fill_n(A + rank * in, (columns - rank) * in, 0.0f);
  for (int64_t r = 0; rank < columns && r < out; ++r) std::fill(B + r * ld + rank, B + r * ld + columns, 0.0f);
  for (const auto& t : set.terms[site]) {
    const ExpertLowRank& term = p.terms[site][t.index];
    const float *a = data<float>(term.A_EPX) + expert * t.rank * in, *b = data<float>(term.B_EXP) + expert * out * t.rank;
    std::copy_n(a, t.rank * in, A + t.first * in);
    loops<float>().scale_rows(b, t.rank, float(term.scale), B + t.first, ld, out, t.rank);
  }
}

// Made by the task that uses them: they stay in its cache, and nothing of size experts x rank is written to memory.
template <class T>
FactorPanels<T> pack_factors(const MoeProblem& p, const RankSet& set, int64_t expert, bool backward, Scratch& scratch) {
  FactorPanels<T> f;
  if (set.empty()) return f;
  const int64_t D = p.model_width(), F = p.expert_width(), gu = set.gate_up(), g = set.columns[kGate], u = set.columns[kUp], d = set.columns[kDown];
  T* out = scratch.take<T>(factor_elements<T>(set, D, F, backward));
  float *A_gu = scratch.take<float>(gu * D), *A_d = scratch.take<float>(d * F);
  float *B_g = scratch.take<float>(F * gu), *B_u = scratch.take<float>(F * gu), *B_d = scratch.take<float>(D * d);
  concatenate(p, set, kGate, expert, A_gu, B_g, D, F, gu);
  concatenate(p, set, kUp, expert, A_gu + g * D, B_u + g, D, F, gu);
  concatenate(p, set, kDown, expert, A_d, B_d, F, D, d);
  const auto place = [&](const Panels<T>& panels) {
    out += Panels<T>::elements(panels.k, panels.n);
    return panels;
  };
  if (!backward) {
    for (int64_t r = 0; kJointThin<T> && r < F; ++r) {
      std::fill_n(B_g + r * gu + g, u, 0.0f);
      std::fill_n(B_u + r * gu, g, 0.0f);
    }
    f.B_out[kGate] = place(pack_transposed_float<T>(B_g, gu, kJointThin<T> ? gu : g, F, out));
    f.B_out[kUp] = place(pack_transposed_float<T>(B_u + (kJointThin<T> ? 0 : g), gu, kJointThin<T> ? gu : u, F, out));
    f.B_out[kDown] = place(pack_transposed_float<T>(B_d, d, d, D, out));
    f.A_in[0] = place(pack_transposed_float<T>(A_gu, D, D, gu, out));
    f.A_in[1] = place(pack_transposed_float<T>(A_d, F, F, d, out));
  } else {
    f.B_in[kGate] = place(pack_plain_float<T>(B_g, gu, F, g, out));
    f.B_in[kUp] = place(pack_plain_float<T>(B_u + g, gu, F, u, out));
    f.B_in[kDown] = place(pack_plain_float<T>(B_d, d, D, d, out));
    f.A_out[0] = place(pack_plain_float<T>(A_gu, D, gu, D, out));
    f.A_out[1] = place(pack_plain_float<T>(A_d, F, d, F, out));
  }
  return f;
}

}  // namespace moegraft::kernels
