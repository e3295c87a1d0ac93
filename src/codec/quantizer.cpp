#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/codec/train.h"

namespace moegraft::codec {
namespace {

constexpr int64_t kSpreadStartLimit = 2048;  // clusters; the spread start looks at every point once per cluster

at::Tensor rows(const at::Tensor& points, const std::vector<int64_t>& picks) {
  return points.index_select(0, at::tensor(picks, at::kLong).to(points.device()));
}

at::Tensor random_rows(const at::Tensor& points, int64_t wanted, uint64_t seed) {
  auto order = Rng(seed, "codec.kmeans").permutation(points.size(0));
  std::vector<int64_t> picks;
  for (int64_t i = 0; i < wanted; ++i) picks.push_back(order[size_t(i % points.size(0))]);
  return rows(points, picks);
}

// Each next row with probability proportional to its squared distance from those drawn (k-means++; Arthur and
// Vassilvitskii, SODA 2007).
at::Tensor spread_rows(const at::Tensor& points, int64_t wanted, uint64_t seed) {
  Rng rng(seed, "codec.kmeans");
  std::vector<int64_t> picks = {int64_t(rng.below(uint64_t(points.size(0))))};
  auto distance = (points - points[picks[0]]).square().sum(1);
  while (int64_t(picks.size()) < wanted) {
    const auto cumulative = distance.to(at::kDouble).cumsum(0);
    const double total = cumulative[-1].item<double>();
    const int64_t pick =
        total > 0 ? std::min(at::searchsorted(cumulative, at::Scalar(rng.uniform() * total), false, /*right=*/true)
                                 .item<int64_t>(),
                             points.size(0) - 1)
                  : int64_t(rng.below(uint64_t(points.size(0))));
    picks.push_back(pick);
    distance = at::minimum(distance, (points - points[pick]).square().sum(1));
  }
  return rows(points, picks);
}

at::Tensor nearest_rows(const at::Tensor& points_MZ, const at::Tensor& centres_NZ) {
  return at::addmm(centres_NZ.square().sum(1), points_MZ, centres_NZ.t(), 1, -2).argmin(1);
}

}  // namespace

EmaCodebook::EmaCodebook(at::Tensor codebook_NZ, double decay, double revive_below)
    : codebook_NZ_(codebook_NZ.detach().clone()), decay_(decay), revive_below_(revive_below) {}

int64_t EmaCodebook::update(const at::Tensor& z_MZ, const at::Tensor& ids_M, uint64_t seed, uint64_t step) {
  at::NoGradGuard no_grad;
  const int64_t codes = codebook_NZ_.size(0), rows_seen = z_MZ.size(0);
  const double fair = double(rows_seen) / double(codes);
  if (!counts_N_.defined()) {
    counts_N_ = at::full({codes}, fair, codebook_NZ_.options());
    sums_NZ_ = codebook_NZ_ * fair;
  }
  const auto z = z_MZ.detach();
  counts_N_.mul_(decay_).add_(at::bincount(ids_M, {}, codes).to(at::kFloat), 1 - decay_);
  sums_NZ_.mul_(decay_).add_(at::zeros_like(sums_NZ_).index_add_(0, ids_M, z), 1 - decay_);
  const auto dead = at::nonzero(counts_N_ < revive_below_).flatten();
  const int64_t revived = std::min(dead.size(0), rows_seen);
  if (revived > 0) {
    auto picks = Rng(seed, "codec.revive", step).permutation(rows_seen);
    picks.resize(size_t(revived));
    const auto which = dead.narrow(0, 0, revived);
    sums_NZ_.index_copy_(0, which, rows(z, picks) * fair);
    counts_N_.index_fill_(0, which, fair);
  }
  codebook_NZ_ = sums_NZ_ / counts_N_.clamp_min(1e-6).unsqueeze(1);
  return revived;
}

at::Tensor kmeans(const at::Tensor& points_MZ, int64_t clusters, int64_t iterations, uint64_t seed) {
  at::NoGradGuard no_grad;
  const int64_t count = points_MZ.size(0);
  MOEGRAFT_CHECK(count >= 1, "k-means needs at least one point");
  auto centres =
      clusters <= kSpreadStartLimit ? spread_rows(points_MZ, clusters, seed) : random_rows(points_MZ, clusters, seed);
  for (int64_t round = 0; round < iterations; ++round) {
    const auto ids = nearest_rows(points_MZ, centres);
    const auto counts = at::bincount(ids, {}, clusters);
    const auto sums = at::zeros_like(centres).index_add_(0, ids, points_MZ);
    auto next = sums / counts.clamp_min(1).to(at::kFloat).unsqueeze(1);
    const auto empty = at::nonzero(counts == 0).flatten();
    const int64_t restarts = std::min(empty.size(0), count);
    if (restarts > 0) {
      const auto error = (points_MZ - centres.index_select(0, ids)).square().sum(1);
      next.index_copy_(0, empty.narrow(0, 0, restarts), points_MZ.index_select(0, std::get<1>(error.topk(restarts))));
    }
    centres = next;
  }
  return centres;
}

}  // namespace moegraft::codec
