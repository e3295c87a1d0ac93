#pragma once
// Cross-entropy of rows of logits.

#include "team.h"

namespace moegraft::kernels::cuda {

// One block per row: nll[row] = logsumexp(logits) - logits[target]; d (null: none; may be the logits) = scale * (softmax - [i == target]). Float32
// throughout; the logits are read once for the statistics and once for d.
template <class TIn, class TOut>
struct CrossEntropyRow {
  static constexpr int kLanes = 512;
  const TIn* logits;
  const int64_t* targets;
  TOut* d;
  float* nll;
  int64_t classes;
  float scale;

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t row, const Team& team) const {
    const TIn* in = logits + row * classes;
    const int64_t target = targets[row];
    const float picked = target >= 0 && target < classes ? static_cast<float>(in[target]) : NAN;  // before d overwrites it: the reductions below are barriers
    const float largest = team.max([&](int lane) {
      float m = -INFINITY;
      for (int64_t i = lane; i < classes; i += kLanes) {
        const float x = static_cast<float>(in[i]);
        m = x > m ? x : m;
      }
      return m;
    });
    const float total = team.sum([&](int lane) {
      float part = 0;
      for (int64_t i = lane; i < classes; i += kLanes) part += expf(static_cast<float>(in[i]) - largest);
      return part;
    });
    team.each([&](int lane) {
      if (lane == 0) nll[row] = logf(total) + largest - picked;
      if (!d) return;
      for (int64_t i = lane; i < classes; i += kLanes) {
        const float p = expf(static_cast<float>(in[i]) - largest) / total;
        d[row * classes + i] = static_cast<TOut>(scale * (i == target ? p - 1.0f : p));
      }
    });
  }
};

}  // namespace moegraft::kernels::cuda
