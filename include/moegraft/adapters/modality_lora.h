#pragma once
// Modality-gated LoRA: low-rank terms on the experts' gate/up/down and on attention's q/k/v/o that act only on tokens of given modalities
// (PLoRA's idea, arXiv:2503.22517). The factors live here as float32 leaves; kernels apply them to contiguous rows.

#include <map>
#include <string>
#include <vector>

#include "moegraft/adapters/config.h"
#include "moegraft/model/registry.h"
#include "moegraft/model/sites.h"
#include "moegraft/model/spec.h"

namespace moegraft::adapters {

model::Site parse_site(const std::string& name);  // UsageError names the known ones
const char* site_name(model::Site site);
bool is_ffn_site(model::Site site);  // gate, up, down
// Whether the site's factors are one pair for each expert. FFN sites of a dense model have one for the layer.
bool is_per_expert(const model::DecoderSpec& spec, model::Site site);
// Whether a layer has the site: attention's always, the FFN's in sparse layers, or in every layer of a dense model.
bool has_site(const model::DecoderSpec& spec, int64_t layer, model::Site site);

struct SiteShape {
  int64_t in = 0, out = 0;
};
SiteShape site_shape(const model::DecoderSpec& spec, model::Site site);

class ModalityLora : public model::AdapterSites {
 public:
  // index: position in the run's `adapters` list, part of the parameters' names. modalities: ids of config.modality.
  // A is zero until initialised, B stays zero. experts: {first, count} of those whose factors are here; count 0: all.
  ModalityLora(const model::DecoderSpec& spec, const AdapterConfig& config, int64_t index, std::vector<int64_t> modalities, at::Device device,
               std::pair<int64_t, int64_t> experts = {0, 0});

  std::vector<model::LowRank> at(int64_t layer, model::Site site) const override;

  struct Factor {
    int64_t layer;
    model::Site site;
    std::string name;  // "adapters.0.layers.3.gate"
    at::Tensor A, B;   // leaves
  };
  std::vector<Factor>& factors() { return factors_; }
  const std::vector<Factor>& factors() const { return factors_; }
  const AdapterConfig& config() const { return config_; }
  double scale() const { return scale_; }
  void register_parameters(model::ParameterRegistry& registry, const std::string& provenance) const;

 private:
  AdapterConfig config_;
  std::vector<int64_t> modalities_;
  double scale_;
  int64_t first_expert_, num_experts_, total_experts_;
  std::vector<Factor> factors_;
  std::map<std::pair<int64_t, int>, size_t> index_;
};

// Several adapters on one model.
class AdapterStack : public model::AdapterSites {
 public:
  void add(std::shared_ptr<ModalityLora> adapter) { adapters_.push_back(std::move(adapter)); }
  std::vector<model::LowRank> at(int64_t layer, model::Site site) const override;
  const std::vector<std::shared_ptr<ModalityLora>>& adapters() const { return adapters_; }

 private:
  std::vector<std::shared_ptr<ModalityLora>> adapters_;
};

}  // namespace moegraft::adapters
