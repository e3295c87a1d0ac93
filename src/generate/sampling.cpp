#include "moegraft/generate/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "moegraft/base/check.h"

namespace moegraft::generate {
namespace {

constexpr float kRemoved = -std::numeric_limits<float>::infinity();

int64_t largest(std::span<const float> logits) {
  MOEGRAFT_CHECK(!logits.empty(), "sampling: no logits");
  int64_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    MOEGRAFT_CHECK(!std::isnan(logits[i]) && logits[i] != std::numeric_limits<float>::infinity(), "sampling: logit ", i,
                   " is ", logits[i], "; the model's weights or its dtype do not fit (try --dtype float32)");
    if (logits[i] > logits[best]) best = static_cast<int64_t>(i);
  }
  MOEGRAFT_CHECK(logits[best] != kRemoved, "sampling: every id is masked");
  return best;
}

void keep_top_k(std::vector<float>& scores, int64_t k) {
  if (k <= 0 || k >= static_cast<int64_t>(scores.size())) return;
  std::vector<float> sorted = scores;
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
  const float kth = sorted[k - 1];
  for (float& s : scores)
    if (s < kth) s = kRemoved;
}

// exp(score - max), and their sum.
double exponentials(const std::vector<float>& scores, std::vector<double>& out) {
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  out.resize(scores.size());
  for (size_t i = 0; i < scores.size(); ++i)
    sum += out[i] = scores[i] == kRemoved ? 0.0 : std::exp(double(scores[i]) - top);
  return sum;
}

void keep_top_p(std::vector<float>& scores, double top_p) {
  if (top_p >= 1.0) return;
  std::vector<double> mass;
  const double sum = exponentials(scores, mass);
  std::vector<int64_t> order;
  for (size_t i = 0; i < scores.size(); ++i)
    if (scores[i] != kRemoved) order.push_back(static_cast<int64_t>(i));
  // Least likely first; among equals the lowest id is kept longest, as in greedy.
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] < scores[b] : a > b; });
  double below = 0;
  for (size_t i = 0; i + 1 < order.size(); ++i) {  // the most likely id always stays
    below += mass[order[i]] / sum;
    if (below > 1.0 - top_p) break;
    scores[order[i]] = kRemoved;
  }
}

}  // namespace

void SamplingOptions::validate() const {
  MOEGRAFT_CHECK_USAGE(std::isfinite(temperature) && temperature >= 0,
                       "temperature must be a number of at least 0 (0: greedy), got ", temperature);
  MOEGRAFT_CHECK_USAGE(top_k >= 0, "top_k must be at least 0 (0: off), got ", top_k);
  MOEGRAFT_CHECK_USAGE(top_p > 0 && top_p <= 1, "top_p must be in (0, 1] (1: off), got ", top_p);
}

std::vector<double> probabilities(std::span<const float> logits, const SamplingOptions& options) {
  options.validate();
  const int64_t best = largest(logits);
  std::vector<double> out;
  if (options.temperature == 0) {
    out.assign(logits.size(), 0.0);
    out[best] = 1.0;
    return out;
  }
  std::vector<float> scores(logits.begin(), logits.end());
  keep_top_k(scores,
             options.top_k);  // before scaling: the order is the same, and scaling may round neighbours to a tie
  // The largest is subtracted first, so that a small temperature cannot overflow.
  for (float& s : scores) s = (s - logits[best]) / static_cast<float>(options.temperature);
  keep_top_p(scores, options.top_p);
  const double sum = exponentials(scores, out);
  for (double& p : out) p /= sum;
  return out;
}

int64_t sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng) {
  if (options.temperature == 0) return largest(logits);
  const std::vector<double> p = probabilities(logits, options);
  const double u = rng.uniform();
  double cumulative = 0;
  int64_t last = -1;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0) continue;
    last = static_cast<int64_t>(i);
    cumulative += p[i];
    if (u < cumulative) return last;
  }
  return last;  // the sum ended a rounding error short of 1
}

}  // namespace moegraft::generate
