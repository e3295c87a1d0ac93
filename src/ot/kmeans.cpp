#include "moegraft/ot/kmeans.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::ot {
namespace {

// D^2 sampling: each next seed is drawn in proportion to its squared distance to the seeds so far.
at::Tensor seed_centres(const at::Tensor& x_ND, int64_t k, Rng& rng) {
  const int64_t n = x_ND.size(0);
  std::vector<int64_t> chosen = {int64_t(rng.below(uint64_t(n)))};
  at::Tensor distance_N = (x_ND - x_ND[chosen[0]]).square_().sum(1).to(at::kDouble);
  while (int64_t(chosen.size()) < k) {
    const at::Tensor cumulative = distance_N.cumsum(0).cpu();
    const double* c = cumulative.const_data_ptr<double>();
    const double total = c[n - 1];
    // All remaining points coincide with a seed: any will do.
    const int64_t next = total > 0 ? std::min<int64_t>(n - 1, std::upper_bound(c, c + n, rng.uniform() * total) - c)
                                   : int64_t(rng.below(uint64_t(n)));
    chosen.push_back(next);
    distance_N = at::minimum(distance_N, (x_ND - x_ND[next]).square_().sum(1).to(at::kDouble));
  }
  return x_ND.index_select(0, at::tensor(chosen, at::kLong).to(x_ND.device())).clone();
}

at::Tensor random_rows(const at::Tensor& x_ND, int64_t k, Rng& rng) {
  const auto order = rng.permutation(x_ND.size(0));
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < k; ++i) chosen.push_back(order[size_t(i % x_ND.size(0))]);
  return x_ND.index_select(0, at::tensor(chosen, at::kLong).to(x_ND.device()));
}

// Means in float64: sums of many float32 rows lose digits. The loop fixes the order of summation.
template <class T>
void accumulate(const T* x, const int64_t* assignment, int64_t n, int64_t d, double* sums) {
  for (int64_t i = 0; i < n; ++i) {
    double* sum = sums + assignment[i] * d;
    for (int64_t j = 0; j < d; ++j) sum[j] += double(x[i * d + j]);
  }
}

at::Tensor cluster_sums(const at::Tensor& x_ND, const at::Tensor& assignment_N, int64_t k, at::ScalarType type) {
  if (type == at::kFloat)
    return at::zeros({k, x_ND.size(1)}, x_ND.options().dtype(at::kFloat))
        .index_add_(0, assignment_N, x_ND.to(at::kFloat));
  at::Tensor sums = at::zeros({k, x_ND.size(1)}, x_ND.options().dtype(at::kDouble));
  if (!x_ND.is_cpu()) return sums.index_add_(0, assignment_N, x_ND.to(at::kDouble));
  if (x_ND.scalar_type() == at::kFloat)
    accumulate(x_ND.const_data_ptr<float>(), assignment_N.const_data_ptr<int64_t>(), x_ND.size(0), x_ND.size(1),
               sums.mutable_data_ptr<double>());
  else
    accumulate(x_ND.const_data_ptr<double>(), assignment_N.const_data_ptr<int64_t>(), x_ND.size(0), x_ND.size(1),
               sums.mutable_data_ptr<double>());
  return sums;
}

// Gives each empty cluster the point furthest from its centre, taken from a cluster that keeps at least one.
void fill_empty(at::Tensor& assignment_N, const at::Tensor& distance_N, at::Tensor& counts_K) {
  at::Tensor counts = counts_K.cpu().contiguous();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  if (std::find(count, count + counts.numel(), 0) == count + counts.numel()) return;
  at::Tensor assignment = assignment_N.cpu().contiguous();
  int64_t* own = assignment.mutable_data_ptr<int64_t>();
  const at::Tensor order =
      std::get<1>(distance_N.cpu().to(at::kDouble).sort(/*stable=*/true, 0, /*descending=*/true)).contiguous();
  const int64_t* candidates = order.const_data_ptr<int64_t>();
  int64_t next = 0;
  for (int64_t c = 0; c < counts.numel(); ++c) {
    if (count[c]) continue;
    while (count[own[candidates[next]]] < 2) ++next;  // k <= n: some cluster has two
    --count[own[candidates[next]]];
    own[candidates[next++]] = c;
    count[c] = 1;
  }
  assignment_N = assignment.to(assignment_N.device());
  counts_K = counts.to(counts_K.device());
}

// Moves the centre of each empty cluster to one of the points furthest from theirs.
void restart_empty(at::Tensor& centres_KD, const at::Tensor& x_ND, const at::Tensor& distance_N,
                   const at::Tensor& counts_K) {
  const at::Tensor empty = at::nonzero(counts_K == 0).flatten();
  const int64_t restarts = std::min(empty.size(0), x_ND.size(0));
  if (restarts > 0)
    centres_KD.index_copy_(0, empty.narrow(0, 0, restarts),
                           x_ND.index_select(0, std::get<1>(distance_N.topk(restarts))));
}

// Index of the nearest centre of each row, and the squared distance to it, from products of at most `distances`
// elements.
std::pair<at::Tensor, at::Tensor> nearest_in_chunks(const at::Tensor& points_ND, const at::Tensor& centres_KD,
                                                    int64_t distances) {
  at::NoGradGuard no_grad;
  const int64_t n = points_ND.size(0), step = std::max<int64_t>(1, distances / centres_KD.size(0));
  const at::Tensor centre_norms = centres_KD.square().sum(1), transposed = centres_KD.t();
  std::vector<at::Tensor> assignments, squares;
  for (int64_t i = 0; i < n; i += step) {
    const at::Tensor x = points_ND.slice(0, i, std::min(n, i + step));
    const at::Tensor index = std::get<1>(at::addmm(centre_norms, x, transposed, 1.0, -2.0).min(1));
    assignments.push_back(index);
    squares.push_back(
        (x - centres_KD.index_select(0, index)).square_().sum(1));  // exact: the product form cancels near zero
  }
  return {at::cat(assignments), at::cat(squares)};
}

// Each point's centre, sizes differing by one at most, and the squared distance to it. Greedy: points in the order of
// what their second-best centre would cost them, each takes the nearest centre with room.
std::pair<at::Tensor, at::Tensor> nearest_with_room(const at::Tensor& x_ND, const at::Tensor& centres_KD) {
  const int64_t n = x_ND.size(0), k = centres_KD.size(0);
  const at::Tensor cost_NK =
      at::addmm(centres_KD.square().sum(1), x_ND, centres_KD.t(), 1.0, -2.0).to(at::kDouble).cpu();
  const auto [sorted_NK, choices_NK] = cost_NK.sort(/*stable=*/true, 1, /*descending=*/false);
  const at::Tensor regret_N = sorted_NK.select(1, std::min<int64_t>(1, k - 1)) - sorted_NK.select(1, 0);
  const at::Tensor order = std::get<1>(regret_N.sort(/*stable=*/true, 0, /*descending=*/true)).contiguous(),
                   choices = choices_NK.contiguous();
  at::Tensor assignment_N = at::empty({n}, at::kLong);
  std::vector<int64_t> room(size_t(k), n / k);
  int64_t larger = n % k;  // clusters that may take one more
  std::vector<bool> is_larger(size_t(k), false);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t point = order.const_data_ptr<int64_t>()[i];
    for (const int64_t* choice = choices.const_data_ptr<int64_t>() + point * k;; ++choice) {
      const auto c = size_t(*choice);
      if (room[c] == 0 && larger > 0 && !is_larger[c]) ++room[c], --larger, is_larger[c] = true;
      if (room[c] == 0) continue;
      --room[c];
      assignment_N.mutable_data_ptr<int64_t>()[point] = *choice;
      break;
    }
  }
  assignment_N = assignment_N.to(x_ND.device());
  return {assignment_N, (x_ND - centres_KD.index_select(0, assignment_N)).square_().sum(1)};
}

KMeansResult lloyd(const at::Tensor& x_ND, int64_t k, const KMeansSettings& settings, Rng& rng) {
  KMeansResult r;
  r.centres_KD = settings.start == KMeansStart::spread ? seed_centres(x_ND, k, rng) : random_rows(x_ND, k, rng);
  double previous = std::numeric_limits<double>::infinity();
  for (;;) {
    auto [assignment, distance] = settings.balanced ? nearest_with_room(x_ND, r.centres_KD)
                                                    : nearest_in_chunks(x_ND, r.centres_KD, settings.distances);
    r.assignment_N = assignment;
    r.counts_K = at::bincount(assignment, {}, k);
    if (settings.empty == EmptyCluster::take) fill_empty(r.assignment_N, distance, r.counts_K);
    r.inertia = distance.sum(at::kDouble).item<double>();
    r.centres_KD = (cluster_sums(x_ND, r.assignment_N, k, settings.sums) / r.counts_K.clamp_min(1).unsqueeze(1))
                       .to(x_ND.scalar_type());
    if (settings.empty == EmptyCluster::restart) restart_empty(r.centres_KD, x_ND, distance, r.counts_K);
    if (++r.iterations >= settings.max_iterations ||
        (settings.tolerance >= 0 && previous - r.inertia <= settings.tolerance * r.inertia))
      break;
    previous = r.inertia;
  }
  // Inertia of what is returned: own cluster's mean, not the nearest centre of the last round.
  r.inertia = (x_ND - r.centres_KD.index_select(0, r.assignment_N)).square_().sum(at::kDouble).item<double>();
  return r;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> nearest(const at::Tensor& points_ND, const at::Tensor& centres_KD) {
  return nearest_in_chunks(points_ND, centres_KD, kDistancesAtOnce);
}

KMeansResult kmeans(const at::Tensor& points_ND, int64_t k, const KMeansSettings& settings) {
  at::NoGradGuard no_grad;
  MOEGRAFT_CHECK(points_ND.defined() && points_ND.dim() == 2 && points_ND.size(0) > 0 && points_ND.size(1) > 0,
                 "k-means needs points [n, d], got ",
                 points_ND.defined() ? points_ND.sizes().vec() : std::vector<int64_t>{});
  MOEGRAFT_CHECK(points_ND.scalar_type() == at::kFloat || points_ND.scalar_type() == at::kDouble,
                 "k-means needs float32 or float64 points, got ", points_ND.dtype().name());
  const bool restarting = settings.empty == EmptyCluster::restart;
  MOEGRAFT_CHECK(k >= 1 && (restarting || k <= points_ND.size(0)), "k-means needs 1 <= k <= ", points_ND.size(0),
                 " points, got k = ", k);
  MOEGRAFT_CHECK(settings.restarts >= 1 && settings.max_iterations >= 1,
                 "k-means needs at least one restart and one iteration, got ", settings.restarts, " and ",
                 settings.max_iterations);
  MOEGRAFT_CHECK(!settings.balanced || settings.max_samples == 0,
                 "k-means: balanced clusters need every point, got max_samples ", settings.max_samples);
  // What chooses between fits or gives every cluster points would look at clusters that are empty.
  MOEGRAFT_CHECK(!restarting || (settings.restarts == 1 && settings.max_samples == 0 && !settings.balanced),
                 "k-means: empty clusters restart in one plain fit alone, got restarts ", settings.restarts,
                 ", max_samples ", settings.max_samples, ", balanced ", settings.balanced);
  const at::Tensor all = points_ND.detach().contiguous();
  MOEGRAFT_CHECK(all.isfinite().all().item<bool>(), "k-means: the points hold NaN or Inf");
  const int64_t n = all.size(0);
  at::Tensor sample = all;
  const bool sampled = settings.max_samples > 0 && std::max(settings.max_samples, k) < n;
  if (sampled) {
    auto order = Rng(settings.seed, "ot.kmeans.sample").permutation(n);
    order.resize(std::max(settings.max_samples, k));
    std::sort(order.begin(), order.end());
    sample = all.index_select(0, at::tensor(order, at::kLong).to(all.device()));
  }
  KMeansResult best;
  for (int64_t restart = 0; restart < settings.restarts; ++restart) {
    Rng rng(settings.seed, settings.purpose, uint64_t(restart));
    KMeansResult r = lloyd(sample, k, settings, rng);
    if (restart == 0 || r.inertia < best.inertia) best = std::move(r);
  }
  if (sampled) {
    at::Tensor distance;
    std::tie(best.assignment_N, distance) = nearest_in_chunks(all, best.centres_KD, settings.distances);
    best.counts_K = at::bincount(best.assignment_N, {}, k);
    fill_empty(best.assignment_N, distance, best.counts_K);
    best.inertia = (all - best.centres_KD.index_select(0, best.assignment_N)).square_().sum(at::kDouble).item<double>();
  }
  return best;
}

}  // namespace moegraft::ot
