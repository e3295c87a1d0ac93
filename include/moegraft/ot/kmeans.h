#pragma once
// Lloyd's k-means with k-means++ seeding (Arthur & Vassilvitskii 2007). Deterministic by seed.

#include <torch/types.h>

namespace moegraft::ot {

struct KMeansSettings {
  int64_t restarts = 3;
  int64_t max_iterations = 50;
  double tolerance = 1e-6;  // stop when the inertia falls by less than this share
  int64_t max_samples = 0;  // fit on at most this many rows (0: all), then assign every row
  bool balanced = false;  // sizes of clusters differ by one at most: points that would lose most choose first, each the
                          // nearest centre that has room
  uint64_t seed = 0;
};

struct KMeansResult {
  at::Tensor centres_KD;    // dtype of the points
  at::Tensor assignment_N;  // int64
  at::Tensor counts_K;      // int64, each >= 1
  double inertia = 0;       // sum of squared distances to the own centre
  int64_t iterations = 0;
};

// points_ND float32 or float64, 1 <= k <= n. An empty cluster takes the point furthest from its centre; with fewer
// distinct points than k some clusters stay single copies. UserError: k out of range, NaN, wrong dtype or shape,
// balanced with max_samples.
KMeansResult kmeans(const at::Tensor& points_ND, int64_t k, const KMeansSettings& settings = {});

// Index of the nearest centre of each row, and the squared distance to it.
std::pair<at::Tensor, at::Tensor> nearest(const at::Tensor& points_ND, const at::Tensor& centres_KD);

}  // namespace moegraft::ot
