#pragma once
// Cross-entropy of rows of logits.

#include "team.h"

namespace moegraft::kernels::cuda {

// One block per row: nll[row] = logsumexp(logits) - logits[target]; d (null: none; may be the logits) = scale *
// (softmax - [i == target]). Float32 throughout. The logits are read once for the statistics, which follow the largest
// so far (online softmax, arXiv:1805.02867), and once for d. Lanes take packs of kPack elements as they lie in memory,
// from a tensor's start at 16 bytes on: a row of an odd width starts and ends inside a pack. Which elements a lane
// adds, and in which order, follows from row and width alone.
template <class TIn, class TOut>
struct CrossEntropyRow {
  static constexpr int kLanes = 512, kPack = 8;
  const TIn* logits;
  const int64_t* targets;
  TOut* d;
  float* nll;
  int64_t classes;
  float scale;

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t row, const Team& team) const {
    const TIn* in = logits + row * classes;
    const int64_t lead = row * classes % kPack, target = targets[row];
    const float picked = target >= 0 && target < classes
                             ? static_cast<float>(in[target])
                             : NAN;  // before d overwrites it: the reduction below is a barrier
    const SoftmaxSum sum = team.softmax([&](int lane) {
      SoftmaxSum s{-INFINITY, 0};
      for (int64_t first = int64_t(lane) * kPack - lead; first < classes; first += int64_t(kLanes) * kPack) {
        float x[kPack];
        read(in, first, x);
        float largest = s.largest, part = 0;
        for (int v = 0; v < kPack; ++v) largest = x[v] > largest ? x[v] : largest;
        for (int v = 0; v < kPack; ++v)
          part +=
              x[v] == -INFINITY ? 0.0f : expf(x[v] - largest);  // nothing but -inf so far: no NaN from their difference
        s = {largest, part + rescaled(s, largest)};
      }
      return s;
    });
    const float inverse = 1.0f / sum.total;
    team.each([&](int lane) {
      if (lane == 0)
        nll[row] = logf(sum.total) + (sum.largest - picked);  // the difference first: it is exact where they are close
      if (!d) return;
      for (int64_t first = int64_t(lane) * kPack - lead; first < classes; first += int64_t(kLanes) * kPack) {
        float x[kPack];
        read(in, first, x);
        for (int v = 0; v < kPack; ++v) {
          const float p = expf(x[v] - sum.largest) * inverse;
          x[v] = scale * (first + v == target ? p - 1.0f : p);
        }
        write(x, d + row * classes, first);
      }
    });
  }

 private:
  MOEGRAFT_HD bool whole(int64_t first) const { return first >= 0 && first + kPack <= classes; }
  MOEGRAFT_HD bool inside(int64_t i) const { return i >= 0 && i < classes; }
  // Elements [first, first + kPack) of a row; -inf, which adds nothing, beyond its ends.
  MOEGRAFT_HD void read(const TIn* from, int64_t first, float (&x)[kPack]) const {
    if (whole(first)) return load<kPack>(from + first, x);
    for (int v = 0; v < kPack; ++v) x[v] = inside(first + v) ? static_cast<float>(from[first + v]) : -INFINITY;
  }
  MOEGRAFT_HD void write(const float (&x)[kPack], TOut* to, int64_t first) const {
    if (whole(first)) return store<kPack>(x, to + first);
    for (int v = 0; v < kPack; ++v)
      if (inside(first + v)) to[first + v] = static_cast<TOut>(x[v]);
  }
};

}  // namespace moegraft::kernels::cuda
