#pragma once
// Routing statistics by modality: accumulated on the device while the model runs, read out every routing.every steps.
// Letters: L layers, M modalities (text first), E experts.

#include <torch/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "moegraft/model/decoder.h"

namespace moegraft::routing {

// Of one modality in one layer. Everything but `tokens` is empty or NaN when no token of the modality passed.
struct ModalityLoad {
  int64_t tokens = 0;
  std::vector<double> load_E;         // share of the selections, sums to 1
  std::vector<double> probability_E;  // mean router probability before top-k
  double entropy = 0;                 // of the load, 1 = uniform (divided by ln E; 1 when E = 1)
  double imbalance = 0;               // max / mean load, 1 = uniform, E = all to one expert
  int64_t dead = 0;                   // experts without any selection
  double router_entropy = 0;          // mean entropy of a token's probabilities, normalised in the same way
  double confidence = 0;              // mean top-1 margin: largest minus second largest probability
};

struct LayerRouting {
  int64_t layer = 0;
  std::vector<ModalityLoad> modalities;
  // Jensen-Shannon divergence between the loads of text and of modality m, in bits: 0 equal, 1 disjoint. Index 0 (text
  // against itself) is 0; NaN without tokens.
  std::vector<double> divergence_M;
  // I(expert; modality) of the selections as they came, in bits. NaN without tokens of at least two modalities.
  double mutual_information = 0;
  // Per expert: modality m's share of the load when every modality is weighed equally; "agnostic" between 1/3 and 2/3.
  std::vector<std::string> selectivity_E;
};

struct RoutingReport {
  std::vector<std::string> modality_names;  // text first
  int64_t num_experts = 0;
  std::vector<LayerRouting> layers;  // those that saw tokens

  // Means over layers; NaN (null in JSON) without data.
  double mean_divergence(size_t modality) const;
  double mean_entropy(size_t modality) const;
};

class RoutingStats : public model::RoutingObserver {
 public:
  // modality_names: text first, then the run's modalities in the order of their ids. num_experts 0: a dense model,
  // whose layers are all left out.
  RoutingStats(int64_t num_layers, int64_t num_experts, std::vector<std::string> modality_names,
               at::Device device = at::kCPU);

  // Adds one router call. No host synchronisation, no gradient. InvariantError on a shape that does not fit.
  void observe(int64_t layer, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK,
               const at::Tensor& topk_weights_TK, const at::Tensor& modality_T) override;

  // Copies to the host (the only synchronisation) and derives the measures.
  RoutingReport read() const;
  void reset();

  // float64 [L, M, 2E + 3]: selections, probability mass, tokens, router entropy, margin. Sums, so ranks reduce it by
  // adding.
  at::Tensor& sums() { return sums_LMX_; }

 private:
  int64_t num_experts_;
  std::vector<std::string> names_;
  at::Tensor sums_LMX_;
};

// One line of routing.jsonl, without a line break.
std::string to_json_line(const RoutingReport& report, int64_t step);

struct RoutingLine {
  int64_t step = 0;
  RoutingReport report;
};
// What to_json_line wrote, with measures to its six digits; modalities after text in the order of their names, which is
// that of a run's ids. where: the line's place in messages, "routing.jsonl:3". UserError when it does not read as one.
RoutingLine parse_json_line(const std::string& line, const std::string& where);

// Tags and values for TensorBoard: means over layers, and each layer's divergence.
std::vector<std::pair<std::string, double>> scalars(const RoutingReport& report);

// One panel per modality side by side (layers down, experts across, `cell` pixels each), dark = unused, bright = the
// panel's largest load. uint8 [3,H,W].
at::Tensor heat_map(const RoutingReport& report, int64_t cell = 12);

// value in [0,1] -> RGB along dark violet, blue, teal, green, yellow: lightness rises evenly, so it reads in grey too.
std::array<uint8_t, 3> colour(double value);

// Building blocks, exact on their closed forms. Distributions sum to 1; 0 log 0 = 0.
double normalised_entropy(const std::vector<double>& p);                                 // in [0,1]
double jensen_shannon_bits(const std::vector<double>& p, const std::vector<double>& q);  // in [0,1]
double mutual_information_bits(const std::vector<std::vector<double>>& counts_ME);

}  // namespace moegraft::routing
