#include "moegraft/routing/stats.h"

#include "libtorch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/kernels/route.h"

namespace moegraft::routing {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

std::vector<double> normalised(std::vector<double> values) {
  const double total = std::accumulate(values.begin(), values.end(), 0.0);
  if (total <= 0) return {};
  for (double& value : values) value /= total;
  return values;
}

template <class F>
double mean_over(const std::vector<LayerRouting>& layers, F&& value_of) {
  double sum = 0;
  int64_t count = 0;
  for (const auto& layer : layers) {
    const double value = value_of(layer);
    if (!std::isnan(value)) sum += value, ++count;
  }
  return count ? sum / double(count) : kNone;
}

std::vector<std::string> selectivity(const std::vector<ModalityLoad>& modalities, const std::vector<std::string>& names,
                                     int64_t num_experts) {
  std::vector<std::string> labels(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) {
    double total = 0;
    for (const auto& m : modalities)
      if (m.tokens) total += m.load_E[e];
    labels[e] = total > 0 ? "agnostic" : "dead";
    for (size_t m = 0; m < modalities.size(); ++m)
      if (modalities[m].tokens && total > 0 && modalities[m].load_E[e] / total > 2.0 / 3.0) labels[e] = names[m];
  }
  return labels;
}

}  // namespace

double normalised_entropy(const std::vector<double>& p) {
  if (p.size() < 2) return 1.0;
  double sum = 0;
  for (const double x : p)
    if (x > 0) sum -= x * std::log(x);
  return sum / std::log(double(p.size()));
}

double jensen_shannon_bits(const std::vector<double>& p, const std::vector<double>& q) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double middle = 0.5 * (p[i] + q[i]);
    if (p[i] > 0) sum += 0.5 * p[i] * std::log2(p[i] / middle);
    if (q[i] > 0) sum += 0.5 * q[i] * std::log2(q[i] / middle);
  }
  return std::max(0.0, sum);
}

double mutual_information_bits(const std::vector<std::vector<double>>& counts_ME) {
  double total = 0;
  std::vector<double> rows(counts_ME.size()), columns(counts_ME.empty() ? 0 : counts_ME[0].size());
  for (size_t m = 0; m < counts_ME.size(); ++m)
    for (size_t e = 0; e < columns.size(); ++e)
      total += counts_ME[m][e], rows[m] += counts_ME[m][e], columns[e] += counts_ME[m][e];
  double sum = 0;
  for (size_t m = 0; m < counts_ME.size(); ++m)
    for (size_t e = 0; e < columns.size(); ++e)
      if (counts_ME[m][e] > 0)
        sum += counts_ME[m][e] / total * std::log2(counts_ME[m][e] * total / (rows[m] * columns[e]));
  return std::max(0.0, sum);
}

double RoutingReport::mean_divergence(size_t modality) const {
  return mean_over(layers, [&](const LayerRouting& layer) { return layer.divergence_M.at(modality); });
}

double RoutingReport::mean_entropy(size_t modality) const {
  return mean_over(layers, [&](const LayerRouting& layer) { return layer.modalities.at(modality).entropy; });
}

RoutingStats::RoutingStats(int64_t num_layers, int64_t num_experts, std::vector<std::string> modality_names,
                           at::Device device)
    : num_experts_(std::max<int64_t>(num_experts, 1)), names_(std::move(modality_names)) {
  MOEGRAFT_INVARIANT(!names_.empty() && names_[0] == "text", "the first modality is text");
  sums_LMX_ = at::zeros({num_layers, int64_t(names_.size()), 2 * num_experts_ + 3},
                        at::TensorOptions().dtype(at::kDouble).device(device));
}

void RoutingStats::observe(int64_t layer, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK, const at::Tensor&,
                           const at::Tensor& modality_T) {
  at::NoGradGuard no_grad;
  MOEGRAFT_INVARIANT(layer >= 0 && layer < sums_LMX_.size(0), "layer ", layer, " of ", sums_LMX_.size(0));
  MOEGRAFT_INVARIANT(probs_TE.dim() == 2 && probs_TE.size(1) == num_experts_ && topk_ids_TK.dim() == 2 &&
                         topk_ids_TK.size(0) == probs_TE.size(0),
                     "router output shapes");
  if (probs_TE.size(0) > 0) kernels::add_routing_sums(sums_LMX_[layer], probs_TE, topk_ids_TK, modality_T);
}

void RoutingStats::reset() { sums_LMX_.zero_(); }

RoutingReport RoutingStats::read() const {
  const auto host = sums_LMX_.cpu().contiguous();
  const auto sums = host.accessor<double, 3>();
  const int64_t E = num_experts_, M = host.size(1);
  RoutingReport report;
  report.modality_names = names_;
  report.num_experts = E;
  for (int64_t l = 0; l < host.size(0); ++l) {
    LayerRouting layer;
    layer.layer = l;
    std::vector<std::vector<double>> counts_ME;
    int64_t present = 0;
    for (int64_t m = 0; m < M; ++m) {
      ModalityLoad load;
      load.tokens = std::llround(sums[l][m][2 * E]);
      std::vector<double> counts(E), mass(E);
      for (int64_t e = 0; e < E; ++e) counts[e] = sums[l][m][e], mass[e] = sums[l][m][E + e];
      if (load.tokens > 0) {
        ++present;
        load.load_E = normalised(counts);
        for (double& value : mass) value /= double(load.tokens);
        load.probability_E = mass;
        load.entropy = normalised_entropy(load.load_E);
        load.imbalance = *std::max_element(load.load_E.begin(), load.load_E.end()) * double(E);
        load.dead = std::count(counts.begin(), counts.end(), 0.0);
        load.router_entropy = sums[l][m][2 * E + 1] / double(load.tokens);
        load.confidence = sums[l][m][2 * E + 2] / double(load.tokens);
      } else {
        load.entropy = load.imbalance = load.router_entropy = load.confidence = kNone;
      }
      layer.modalities.push_back(std::move(load));
      counts_ME.push_back(std::move(counts));
    }
    if (present == 0) continue;  // a dense layer, or nothing ran
    const auto& text = layer.modalities[0];
    for (const auto& other : layer.modalities)
      layer.divergence_M.push_back(text.tokens && other.tokens ? jensen_shannon_bits(text.load_E, other.load_E)
                                                               : kNone);
    layer.mutual_information = present > 1 ? mutual_information_bits(counts_ME) : kNone;
    layer.selectivity_E = selectivity(layer.modalities, names_, E);
    report.layers.push_back(std::move(layer));
  }
  return report;
}

}  // namespace moegraft::routing
