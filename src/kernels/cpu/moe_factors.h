#pragma once
// Low-rank factors as right operands of block products: per (expert, group) the terms that act there, side by side
// along the rank.

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "../factor_cache.h"
#include "../moe.h"
#include "block_product.h"

namespace moegraft::kernels {

// The terms of each site that act on a group, side by side along the rank.
struct RankSet {
  struct Term {
    int64_t index, first, rank;  // of problem.terms[site]; columns [first, first + rank)
  };
  std::array<std::vector<Term>, kSites> terms;
  std::array<int64_t, kSites> rank{};  // real
  std::array<int64_t, kSites>
      columns{};  // padded: down's, and gate's and up's together, to whole steps of the micro-kernel (depth_step)
  int64_t gate_up() const { return columns[kGate] + columns[kUp]; }
  bool empty() const { return rank[kGate] + rank[kUp] + rank[kDown] == 0; }
};

template <class T>
RankSet rank_set(const MoeProblem& p, int64_t group) {
  const int64_t step = micro_kernel<T>()->depth_step;
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

inline bool weighted(const MoeProblem& p, const RankSet& set, int site) {
  return std::any_of(set.terms[site].begin(), set.terms[site].end(),
                     [&](const RankSet::Term& t) { return p.terms[site][t.index].weight_X.defined(); });
}

// Thin products of one site, rows of the given tokens [rows, ld]: each term's columns times the weight of the row,
// where it has weights.
template <class T>
void weigh_rows(const MoeProblem& p, const RankSet& set, int site, const int32_t* token, int64_t rows, T* t,
                int64_t ld) {
  constexpr int64_t kAtOnce = 64;
  float wide[kAtOnce];
  for (const RankSet::Term& term : set.terms[site]) {
    const at::Tensor& weight = p.terms[site][term.index].weight_X;
    if (!weight.defined()) continue;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < term.rank; c += kAtOnce) {
        T* at = t + r * ld + term.first + c;
        const int64_t n = std::min(kAtOnce, term.rank - c);
        loops<T>().to_float(at, wide, n);
        loops<T>().from_float(wide, data<float>(weight)[token[r]], at, n);
      }
  }
}

// Whether gate's and up's B take both's thin products, with zeros for the other's: where a step of the micro-kernel is
// deeper than ranks are padded to.
template <class T>
bool joint_thin() {
  return micro_kernel<T>()->depth_step > 16;
}

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
  if (!backward)
    return Panels<T>::elements(D, gu) + 2 * Panels<T>::elements(gu, F) + Panels<T>::elements(F, d) +
           Panels<T>::elements(d, D);
  return Panels<T>::elements(gu, D) + Panels<T>::elements(F, s.columns[kGate]) +
         Panels<T>::elements(F, s.columns[kUp]) + Panels<T>::elements(d, F) + Panels<T>::elements(D, d);
}

// One site's factors for an expert: A [rank, in], B [out, ld_B], B without its scale. A lone term's are the masters;
// several lie side by side in scratch.
struct SiteFactors {
  const float *A = nullptr, *B = nullptr;
  int64_t ld_B = 0, rank = 0;
  float scale = 1;
};
inline SiteFactors site_factors(const MoeProblem& p, const RankSet& set, int site, int64_t expert, int64_t in,
                                int64_t out, Scratch& scratch) {
  const auto A_of = [&](const RankSet::Term& t) {
    return data<float>(p.terms[site][t.index].A_EPX) + expert * t.rank * in;
  };
  const auto B_of = [&](const RankSet::Term& t) {
    return data<float>(p.terms[site][t.index].B_EXP) + expert * out * t.rank;
  };
  const auto scale_of = [&](const RankSet::Term& t) { return float(p.terms[site][t.index].scale); };
  const auto& terms = set.terms[site];
  if (terms.empty()) return {};
  if (terms.size() == 1) return {A_of(terms[0]), B_of(terms[0]), terms[0].rank, terms[0].rank, scale_of(terms[0])};
  float *A = scratch.take<float>(set.rank[site] * in), *B = scratch.take<float>(set.rank[site] * out);
  for (const auto& t : terms) {
    std::copy_n(A_of(t), t.rank * in, A + t.first * in);
    loops<float>().scale_rows(B_of(t), t.rank, scale_of(t), B + t.first, set.rank[site], out, t.rank);
  }
  return {A, B, set.rank[site], set.rank[site], 1};
}

// Columns [column, column + count) of `to` from w [n, k] (n <= count; zeros beyond), its k in rows [first, first + k)
// of all, times factor. column and count are multiples of 16.
template <class T>
void put_columns(const float* w, int64_t ld, int64_t k, int64_t n, float factor, int64_t first, int64_t column,
                 int64_t count, const Panels<T>& to, T* memory) {
  for (int64_t c = 0; c < count; c += 16) {
    const int64_t j = (column + c) / kPanel, at = (column + c) % kPanel;
    loops<T>().strip_nk_float(w + c * ld, ld, k, std::clamp<int64_t>(n - c, 0, 16), factor, first,
                              memory + j * kPanel * to.depth() + at * kPair<T>, to.depth(), to.width(j));
  }
}
// Rows [row, row + count) of `to` from w [k, n] (zeros beyond), times factor. row is a multiple of the pair.
template <class T>
void put_rows(const float* w, int64_t ld, int64_t k, int64_t n, float factor, int64_t row, int64_t count,
              const Panels<T>& to, T* memory) {
  for (int64_t j = 0; j < to.count(); ++j)
    loops<T>().pack_kn_float(w + j * kPanel, ld, k, std::clamp<int64_t>(n - j * kPanel, 0, kPanel), factor,
                             memory + j * kPanel * to.depth() + row * to.width(j), count, to.width(j));
}

// Made by the task that uses them: they stay in its cache, and nothing of size experts x rank is written to memory.
// `out`: room for factor_elements.
template <class T>
FactorPanels<T> pack_factors(const MoeProblem& p, const RankSet& set, int64_t expert, bool backward, Scratch& scratch,
                             T* out) {
  FactorPanels<T> f;
  if (set.empty()) return f;
  const int64_t D = p.model_width(), F = p.expert_width(), gu = set.gate_up(), g = set.columns[kGate],
                d = set.columns[kDown];
  const SiteFactors gate = site_factors(p, set, kGate, expert, D, F, scratch),
                    up = site_factors(p, set, kUp, expert, D, F, scratch),
                    down = site_factors(p, set, kDown, expert, F, D, scratch);
  const auto make = [&](Panels<T>& panels, int64_t k, int64_t n, const auto& fill) {
    panels = {out, k, n};
    fill(panels, out);
    out += Panels<T>::elements(k, n);
  };
  const auto B_out = [](const SiteFactors& s, int64_t first, int64_t n) {  // t -> y
    return [=](const Panels<T>& to, T* memory) {
      put_columns(s.B, s.ld_B, s.rank, n, s.scale, first, 0, padded_width(n), to, memory);
    };
  };
  const auto B_in = [](const SiteFactors& s, int64_t k) {  // dy -> dt
    return
        [=](const Panels<T>& to, T* memory) { put_rows(s.B, s.ld_B, k, s.rank, s.scale, 0, to.depth(), to, memory); };
  };
  if (!backward) {
    make(f.B_out[kGate], joint_thin<T>() ? gu : g, F, B_out(gate, 0, F));
    make(f.B_out[kUp], joint_thin<T>() ? gu : gu - g, F, B_out(up, joint_thin<T>() ? g : 0, F));
    make(f.B_out[kDown], d, D, B_out(down, 0, D));
    make(f.A_in[0], D, gu, [&](const Panels<T>& to, T* memory) {
      put_columns(gate.A, D, D, gate.rank, 1.0f, 0, 0, g, to, memory);
      put_columns(up.A, D, D, up.rank, 1.0f, 0, g, gu - g, to, memory);
    });
    make(f.A_in[1], F, d,
         [&](const Panels<T>& to, T* memory) { put_columns(down.A, F, F, down.rank, 1.0f, 0, 0, d, to, memory); });
  } else {
    make(f.B_in[kGate], F, g, B_in(gate, F));
    make(f.B_in[kUp], F, gu - g, B_in(up, F));
    make(f.B_in[kDown], D, d, B_in(down, D));
    make(f.A_out[0], gu, D, [&](const Panels<T>& to, T* memory) {
      put_rows(gate.A, D, gate.rank, D, 1.0f, 0, g, to, memory);
      put_rows(up.A, D, up.rank, D, 1.0f, g, gu - g, to, memory);
    });
    make(f.A_out[1], d, F,
         [&](const Panels<T>& to, T* memory) { put_rows(down.A, F, down.rank, F, 1.0f, 0, d, to, memory); });
  }
  return f;
}
template <class T>
FactorPanels<T> pack_factors(const MoeProblem& p, const RankSet& set, int64_t expert, bool backward, Scratch& scratch) {
  return pack_factors<T>(p, set, expert, backward, scratch,
                         scratch.take<T>(factor_elements<T>(set, p.model_width(), p.expert_width(), backward)));
}

// Those of the forward pass that a FactorCache keeps: each (expert, group) made when first met, by whichever task that
// is.
template <class T>
class KeptFactors {
 public:
  KeptFactors(int64_t num_experts, int64_t num_groups)
      : groups_(num_groups), slots_(static_cast<size_t>(num_experts * num_groups)) {}
  const FactorPanels<T>& get(const MoeProblem& p, const RankSet& set, int64_t expert, int64_t group, Scratch& scratch) {
    Slot& slot = slots_[size_t(expert * groups_ + group)];
    std::call_once(slot.once, [&] {
      slot.memory =
          at::empty({factor_elements<T>(set, p.model_width(), p.expert_width(), false)}, at::TensorOptions(kTypeOf<T>));
      slot.panels = pack_factors<T>(p, set, expert, false, scratch, mutable_data<T>(slot.memory));
    });
    return slot.panels;
  }

 private:
  struct Slot {
    std::once_flag once;
    at::Tensor memory;
    FactorPanels<T> panels;
  };
  int64_t groups_;
  std::vector<Slot> slots_;
};

}  // namespace moegraft::kernels
