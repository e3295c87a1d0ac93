#pragma once
// Lloyd's k-means with k-means++ seeding (Arthur & Vassilvitskii 2007). Deterministic by seed.

#include <torch/types.h>

#include <string>

namespace moegraft::ot {

// Where the centres start. spread: k-means++, which looks at every point once a centre. rows: different rows at random,
// once more from the first when k > n.
enum class KMeansStart { spread, rows };
// What becomes of an empty cluster. take: it takes the point furthest from its centre out of a cluster that keeps one,
// so that none stays empty (k <= n). restart: its centre moves to that point, which stays where it is; for many
// clusters, of which some may stay empty (k > n too).
enum class EmptyCluster { take, restart };

inline constexpr int64_t kDistancesAtOnce = int64_t{1} << 22;  // between points and centres

struct KMeansSettings {
  int64_t restarts = 3;
  int64_t max_iterations = 50;
  double tolerance = 1e-6;  // stop when the inertia falls by less than this share; negative: every iteration is made
  int64_t max_samples = 0;  // fit on at most this many rows (0: all), then assign every row
  bool balanced = false;  // sizes of clusters differ by one at most: points that would lose most choose first, each the
                          // nearest centre that has room
  uint64_t seed = 0;
  KMeansStart start = KMeansStart::spread;
  EmptyCluster empty = EmptyCluster::take;
  at::ScalarType sums = at::kDouble;     // what the points of a cluster are added up in: kDouble, or kFloat
  int64_t distances = kDistancesAtOnce;  // in one product: the bits of a distance may depend on its size
  std::string purpose = "ot.kmeans";     // of the random numbers
};

struct KMeansResult {
  at::Tensor centres_KD;    // dtype of the points
  at::Tensor assignment_N;  // int64
  at::Tensor counts_K;      // int64, each >= 1 unless empty clusters restart
  double inertia = 0;       // sum of squared distances to the own centre
  int64_t iterations = 0;
};

// points_ND float32 or float64, k >= 1 and, unless empty clusters restart, k <= n. With fewer distinct points than k
// some clusters stay single copies. UserError: k out of range, NaN, wrong dtype or shape, balanced with max_samples,
// restarting clusters with balanced, max_samples or several restarts.
KMeansResult kmeans(const at::Tensor& points_ND, int64_t k, const KMeansSettings& settings = {});

// Index of the nearest centre of each row, and the squared distance to it.
std::pair<at::Tensor, at::Tensor> nearest(const at::Tensor& points_ND, const at::Tensor& centres_KD);

}  // namespace moegraft::ot
