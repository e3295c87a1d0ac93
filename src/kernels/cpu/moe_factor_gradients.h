#pragma once
// Gradients of the low-rank factors: strips of rows sum theirs, and the sums are put into the factors' shapes.

#include <algorithm>
#include <array>
#include <vector>

#include "moe_factors.h"

namespace moegraft::kernels {

// Rows [begin, end) of one (expert, group).
struct Strip {
  int64_t expert, group, begin, end;
};

// Where a strip's factor gradients are summed, float32, factors transposed to [columns, padded width].
struct FactorSums {
  std::array<float*, kSites> A{}, B{};
  bool wanted() const { return A[0]; }
};

// A strip whose terms act on no other strip of its expert (nearly all, when rows are few) sums in its thread's own
// memory and writes its gradients while they are in cache; others keep their sums until all are there, and are added in
// strip order.
class FactorGradients {
 public:
  // Allocates the gradients that are needed, in g.
  FactorGradients(const MoeProblem& p, const MoeNeeds& needs, const std::vector<RankSet>& sets,
                  const std::vector<Strip>& strips, MoeGradients& g)
      : p_(p), sets_(sets), strips_(strips) {
    for (int s = 0; s < kSites; ++s)
      for (size_t i = 0; i < p.terms[s].size(); ++i) {
        g.factors[s].emplace_back();
        if (!needs.factors[s][i]) continue;
        g.factors[s].back() = {at::empty_like(p.terms[s][i].A_EPX), at::empty_like(p.terms[s][i].B_EXP)};
        jobs_.push_back({s, int64_t(i), mutable_data<float>(g.factors[s].back().first),
                         mutable_data<float>(g.factors[s].back().second)});
      }
    if (jobs_.empty()) return;
    const int64_t E = p.dispatch.num_experts;
    strips_of_.resize(E);
    for (size_t i = 0; i < strips.size(); ++i)
      if (!sets[strips[i].group].empty()) strips_of_[strips[i].expert].push_back(i);
    alone_.assign(strips.size(), true);
    for (const auto& of : strips_of_)
      for (size_t a = 0; a < of.size(); ++a)
        for (size_t b = a + 1; b < of.size(); ++b)
          if (share_terms(sets[strips[of[a]].group], sets[strips[of[b]].group])) alone_[of[a]] = alone_[of[b]] = false;
    kept_.resize(strips.size());
    int64_t total = 0;
    for (size_t i = 0; i < strips.size(); ++i) total += alone_[i] ? 0 : elements(sets[strips[i].group]);
    memory_ = at::empty({total}, at::kFloat);
    float* at = mutable_data<float>(memory_);
    for (size_t i = 0; i < strips.size(); ++i)
      if (!alone_[i]) {
        kept_[i] = lay_out(sets[strips[i].group], at);
        at += elements(sets[strips[i].group]);
      }
  }

  // All null where nothing is summed.
  FactorSums sums_of(int64_t strip, Scratch& scratch) const {
    const RankSet& set = sets_[strips_[strip].group];
    if (jobs_.empty() || set.empty()) return {};
    return alone_[strip] ? lay_out(set, scratch.take<float>(elements(set))) : kept_[strip];
  }

  // The strip's sums are complete.
  void finish_strip(int64_t strip, const FactorSums& sums) const {
    if (jobs_.empty() || !alone_[strip]) return;
    const Strip& s = strips_[strip];
    for (const Job& job : jobs_)
      if (const auto* term = find(sets_[s.group], job)) put(job, s.expert, *term, sums);
  }

  // All strips are done: what is left, and zeros for experts without rows.
  void finish() const {
    const int64_t E = p_.dispatch.num_experts;
    at::parallel_for(0, int64_t(jobs_.size()) * E, 1, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) finish_expert(jobs_[n / E], n % E);
    });
  }

 private:
  struct Job {
    int site;
    int64_t term;
    float *A, *B;  // [E, rank, in], [E, out, rank]
  };

  int64_t in_width(int site) const { return site == kDown ? p_.expert_width() : p_.model_width(); }
  int64_t out_width(int site) const { return site == kDown ? p_.model_width() : p_.expert_width(); }
  int64_t elements(const RankSet& set) const {
    return set.empty() ? 0
                       : (set.gate_up() + set.columns[kDown]) *
                             (padded_width(p_.model_width()) + padded_width(p_.expert_width()));
  }
  FactorSums lay_out(const RankSet& set, float* at) const {
    FactorSums sums;
    for (int site = 0; site < kSites; ++site) {  // gate's and up's A lie together: one product fills both
      sums.A[site] = at;
      at += set.columns[site] * padded_width(in_width(site));
    }
    for (int site = 0; site < kSites; ++site) {
      sums.B[site] = at;
      at += set.columns[site] * padded_width(out_width(site));
    }
    return sums;
  }

  static const RankSet::Term* find(const RankSet& set, const Job& job) {
    for (const auto& term : set.terms[job.site])
      if (term.index == job.term) return &term;
    return nullptr;
  }
  static bool share_terms(const RankSet& a, const RankSet& b) {
    for (int site = 0; site < kSites; ++site)
      for (const auto& x : a.terms[site])
        for (const auto& y : b.terms[site])
          if (x.index == y.index) return true;
    return false;
  }

  // Into the gradients' shapes; scales B's sums where they are.
  void put(const Job& job, int64_t expert, const RankSet::Term& term, const FactorSums& sums) const {
    const int64_t in = in_width(job.site), out = out_width(job.site), ld_a = padded_width(in), ld_b = padded_width(out),
                  rank = term.rank;
    const float scale = float(p_.terms[job.site][job.term].scale);
    const float* a = sums.A[job.site] + term.first * ld_a;
    float *b = sums.B[job.site] + term.first * ld_b, *A = job.A + expert * rank * in, *B = job.B + expert * out * rank;
    for (int64_t r = 0; r < rank; ++r) std::copy_n(a + r * ld_a, in, A + r * in);
    if (scale != 1.0f) loops<float>().scale_rows(b, ld_b, scale, b, ld_b, rank, out);
    loops<float>().transpose(b, ld_b, rank, out, B, rank);
  }

  void finish_expert(const Job& job, int64_t expert) const {
    const int64_t in = in_width(job.site), out = out_width(job.site), rank = p_.terms[job.site][job.term].A_EPX.size(1);
    const FactorSums* first = nullptr;
    const RankSet::Term* place = nullptr;
    for (const size_t i : strips_of_[expert]) {
      const auto* term = find(sets_[strips_[i].group], job);
      if (!term) continue;
      if (alone_[i]) return;  // written by the strip itself
      if (!first) {
        first = &kept_[i], place = term;
        continue;
      }
      add(kept_[i].A[job.site] + term->first * padded_width(in), rank * padded_width(in),
          first->A[job.site] + place->first * padded_width(in));
      add(kept_[i].B[job.site] + term->first * padded_width(out), rank * padded_width(out),
          first->B[job.site] + place->first * padded_width(out));
    }
    if (first)
      put(job, expert, *place, *first);
    else
      std::fill_n(job.A + expert * rank * in, rank * in, 0.0f),
          std::fill_n(job.B + expert * out * rank, out * rank, 0.0f);
  }
  static void add(const float* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }

  const MoeProblem& p_;
  const std::vector<RankSet>& sets_;
  const std::vector<Strip>& strips_;
  std::vector<Job> jobs_;
  std::vector<std::vector<size_t>> strips_of_;  // [E], those that any term acts on
  std::vector<bool> alone_;                     // per strip
  std::vector<FactorSums> kept_;                // per strip
  at::Tensor memory_;
};

}  // namespace moegraft::kernels
