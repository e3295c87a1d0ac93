#include "moegraft/ot/kmeans.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::ot {
namespace {

at::Tensor blobs(int64_t per_blob, at::ScalarType dtype) {
  Rng rng(1, "test.blobs");
  at::Tensor x = at::empty({3 * per_blob, 2}, at::kDouble);
  for (int64_t i = 0; i < 3 * per_blob; ++i) {
    x[i][0] = 100.0 * double(i % 3) + 0.1 * rng.normal();
    x[i][1] = 0.1 * rng.normal();
  }
  return x.to(dtype);
}

TEST(KMeans, FindsSeparatedBlobs) {
  for (auto dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor x = blobs(50, dtype);
    const KMeansResult r = kmeans(x, 3);
    EXPECT_EQ(r.centres_KD.scalar_type(), dtype);
    EXPECT_TRUE(at::equal(r.counts_K, at::full({3}, 50, at::kLong)));
    for (int64_t i = 3; i < 150; ++i)
      EXPECT_EQ(r.assignment_N[i].item<int64_t>(), r.assignment_N[i % 3].item<int64_t>());
    const at::Tensor own = r.centres_KD.index_select(0, r.assignment_N);
    EXPECT_NEAR(r.inertia, (x - own).square().sum(at::kDouble).item<double>(), 1e-6);
    for (int64_t k = 0; k < 3; ++k)
      EXPECT_TRUE(at::allclose(r.centres_KD[k], x.index({r.assignment_N == k}).mean(0), 1e-5, 1e-5));
  }
}

TEST(KMeans, DeterministicBySeedAndBetterWithRestarts) {
  Rng rng(2, "test.cloud");
  at::Tensor x = at::empty({400, 6}, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i) x.mutable_data_ptr<float>()[i] = float(rng.normal());
  KMeansSettings s;
  s.seed = 5;
  const KMeansResult a = kmeans(x, 20, s), b = kmeans(x, 20, s);
  EXPECT_TRUE(at::equal(a.centres_KD, b.centres_KD));
  EXPECT_TRUE(at::equal(a.assignment_N, b.assignment_N));
  s.restarts = 1;
  EXPECT_LE(a.inertia, kmeans(x, 20, s).inertia);
  s.seed = 6;
  EXPECT_FALSE(at::equal(kmeans(x, 20, s).centres_KD, a.centres_KD));
  s.max_samples = 100;
  const KMeansResult sampled = kmeans(x, 20, s);
  EXPECT_EQ(sampled.assignment_N.size(0), 400);
  EXPECT_EQ(sampled.counts_K.sum().item<int64_t>(), 400);
}

TEST(KMeans, BalancedClustersDifferByOneAtMost) {
  Rng rng(3, "test.lopsided");
  at::Tensor x = at::empty({101, 4}, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i)
    x.mutable_data_ptr<float>()[i] = float(rng.normal() + (i % 7 == 0 ? 5.0 : 0.0));
  for (const int64_t k : {1, 2, 7, 13, 101}) {
    const KMeansResult r = kmeans(x, k, {.balanced = true, .seed = 4}),
                       again = kmeans(x, k, {.balanced = true, .seed = 4});
    EXPECT_EQ(r.counts_K.min().item<int64_t>(), 101 / k);
    EXPECT_EQ(r.counts_K.max().item<int64_t>(), (101 + k - 1) / k);
    EXPECT_TRUE(at::equal(r.assignment_N, again.assignment_N));
    EXPECT_TRUE(at::equal(r.counts_K, at::bincount(r.assignment_N, {}, k)));
    // Not worse than equal runs of a random order.
    const at::Tensor dealt = (at::arange(101) * k).div(101, "floor").to(at::kLong);
    const at::Tensor means = at::zeros({k, 4}).index_add_(0, dealt, x) / at::bincount(dealt, {}, k).unsqueeze(1);
    EXPECT_LE(r.inertia, (x - means.index_select(0, dealt)).square().sum(at::kDouble).item<double>() + 1e-9) << k;
  }
  // Blobs of equal sizes are the clusters; of unequal sizes they cannot be.
  EXPECT_NEAR(kmeans(blobs(50, at::kFloat), 3, {.balanced = true}).inertia, kmeans(blobs(50, at::kFloat), 3).inertia,
              1e-6);
  EXPECT_THROW(kmeans(x, 3, {.max_samples = 50, .balanced = true}), UserError);
}

TEST(KMeans, EmptyClustersAndEdges) {
  // Two distinct points, four clusters: none may stay empty or turn NaN.
  const at::Tensor x = at::tensor({0.0, 0.0, 0.0, 1.0, 1.0}, at::kDouble).unsqueeze(1);
  const KMeansResult r = kmeans(x, 4);
  EXPECT_TRUE((r.counts_K >= 1).all().item<bool>());
  EXPECT_TRUE(r.centres_KD.isfinite().all().item<bool>());
  EXPECT_EQ(r.inertia, 0.0);
  const KMeansResult all = kmeans(x, 5), one = kmeans(x, 1);
  EXPECT_TRUE(at::equal(all.counts_K, at::ones({5}, at::kLong)));
  EXPECT_NEAR(one.centres_KD.item<double>(), 0.4, 1e-15);
  EXPECT_THROW(kmeans(x, 6), UserError);
  EXPECT_THROW(kmeans(x, 0), UserError);
  EXPECT_THROW(kmeans(x.squeeze(1), 2), UserError);
  EXPECT_THROW(kmeans(x.to(at::kLong), 2), UserError);
  EXPECT_THROW(kmeans(x * std::nan(""), 2), UserError);
}

// Lloyd's loop written out: sums in float32, every round is made, empty clusters restart at the points furthest from
// their centres.
at::Tensor plain_lloyd(const at::Tensor& x, at::Tensor centres, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    const at::Tensor ids = at::addmm(centres.square().sum(1), x, centres.t(), 1, -2).argmin(1),
                     counts = at::bincount(ids, {}, centres.size(0));
    at::Tensor next = at::zeros_like(centres).index_add_(0, ids, x) / counts.clamp_min(1).to(at::kFloat).unsqueeze(1);
    const at::Tensor empty = at::nonzero(counts == 0).flatten(),
                     error = (x - centres.index_select(0, ids)).square().sum(1);
    const int64_t restarts = std::min(empty.size(0), x.size(0));
    if (restarts > 0)
      next.index_copy_(0, empty.narrow(0, 0, restarts), x.index_select(0, std::get<1>(error.topk(restarts))));
    centres = next;
  }
  return centres;
}

// As a codec's first codebook is fitted: bit for bit, from rows at random (whose permutation the stream of random
// numbers begins with), with more centres than points too.
TEST(KMeans, RestartingEmptyClustersFollowsThePlainLoop) {
  Rng rng(4, "test.codes");
  at::Tensor x = at::empty({300, 5}, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i)
    x.mutable_data_ptr<float>()[i] = float(std::round(rng.normal()));  // many rows are equal: clusters that start empty
  KMeansSettings s{.restarts = 1,
                   .max_iterations = 7,
                   .tolerance = -1,
                   .seed = 11,
                   .start = KMeansStart::rows,
                   .empty = EmptyCluster::restart,
                   .sums = at::kFloat,
                   .purpose = "test.rows"};
  for (const int64_t k : {1, 40, 250, 300, 420}) {
    const auto order = Rng(11, "test.rows").permutation(300);
    std::vector<int64_t> picks;
    for (int64_t i = 0; i < k; ++i) picks.push_back(order[size_t(i % 300)]);
    const KMeansResult r = kmeans(x, k, s);
    EXPECT_TRUE(at::equal(r.centres_KD, plain_lloyd(x, x.index_select(0, at::tensor(picks, at::kLong)), 7))) << k;
    EXPECT_EQ(r.iterations, 7) << k;
    EXPECT_EQ(r.counts_K.sum().item<int64_t>(), 300) << k;
  }
  KMeansSettings once = s;
  once.max_iterations = 1;
  s.start = KMeansStart::spread;
  EXPECT_LT(kmeans(x, 40, s).inertia, kmeans(x, 40, once).inertia);
  EXPECT_EQ(kmeans(x, 420, s).centres_KD.size(0), 420);
  s.restarts = 2;
  EXPECT_THROW(kmeans(x, 40, s), UserError);
}

}  // namespace
}  // namespace moegraft::ot
