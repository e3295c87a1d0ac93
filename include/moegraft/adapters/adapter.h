#pragma once
// One entry of a run's `adapters`, whatever its kind: low-rank terms on sites of the frozen base that act only on
// tokens of given modalities (PLoRA's gate, arXiv:2503.22517). A kind says what it trains and which terms that makes;
// everything else holds this interface. One that looks at its tokens overrides mlp() (model/sites.h): weights of
// tokens, branches, a loss. docs/extend.md: a new kind.

#include <torch/types.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moegraft/adapters/config.h"
#include "moegraft/adapters/sites.h"
#include "moegraft/model/registry.h"
#include "moegraft/model/sites.h"
#include "moegraft/model/spec.h"

namespace moegraft::adapters {

// What an adapter is made from.
struct AdapterContext {
  const model::DecoderSpec& spec;
  const AdapterConfig& config;
  int64_t index = 0;                // position in the run's `adapters`, part of the parameters' names
  std::vector<int64_t> modalities;  // ids of config.modality
  at::Device device = at::kCPU;
  std::pair<int64_t, int64_t> experts{0, 0};  // first and count of those whose parameters are here; count 0: all
};

class Adapter : public model::AdapterSites {
 public:
  struct Position {
    int64_t layer;
    model::Site site;
  };
  // A trained tensor. per_expert: its first dimension counts experts. start: how it begins.
  struct Parameter {
    std::string name;
    int64_t layer;
    at::Tensor leaf;
    bool per_expert;
    std::string start;
  };
  // A pair y += scale B A x whose A begins as the config's `init` says.
  struct Factor {
    int64_t layer;
    model::Site site;
    std::string name;  // "adapters.0.layers.3.gate"
    at::Tensor A, B;   // leaves
  };

  const AdapterConfig& config() const { return config_; }
  // Where it acts, by layer and then in the config's order of sites. UsageError from the constructor: layers or sites
  // that the model lacks.
  const std::vector<Position>& positions() const { return positions_; }

  // terms() of a position; none elsewhere.
  std::vector<model::LowRank> at(int64_t layer, model::Site site) const final;
  bool mlp_takes_text() const override;
  virtual double scale() const = 0;  // of those terms
  virtual std::vector<Parameter> parameters() const = 0;
  // Puts every parameter where it begins, but A of factors().
  virtual void initialise() = 0;
  // Those whose A an initialisation chooses (graft/initialise_lora.h); none for kinds that begin by themselves.
  virtual const std::vector<Factor>& factors() const;

  void register_parameters(model::ParameterRegistry& registry) const;

 protected:
  explicit Adapter(const AdapterContext& context);
  // Of positions()[position]. Factors are part of the autograd graph where they are not leaves themselves.
  virtual std::vector<model::LowRank> terms(size_t position) const = 0;
  std::string name_of(const Position& position) const;
  int64_t num_experts() const { return num_experts_; }  // here
  const std::vector<int64_t>& modalities() const { return modalities_; }

 private:
  AdapterConfig config_;
  int64_t index_;
  std::vector<int64_t> modalities_;
  int64_t first_expert_, num_experts_, total_experts_;
  std::vector<Position> positions_;
  std::map<std::pair<int64_t, model::Site>, size_t> place_of_;  // in positions_
};

// The adapter of config.kind.
std::shared_ptr<Adapter> make_adapter(const AdapterContext& context);

// Numbers that a kind trains at one site, tensor by tensor in the order of parameters(), of one expert: what plans
// count before anything is made.
std::vector<int64_t> trained_sizes(AdapterKind kind, int64_t rank, const SiteShape& site);
// Whether a kind makes its factors anew in every pass (float32, kept for the backward pass), instead of holding them.
bool makes_factors(AdapterKind kind);

// Several adapters on one model.
class AdapterStack : public model::AdapterSites {
 public:
  void add(std::shared_ptr<Adapter> adapter) { adapters_.push_back(std::move(adapter)); }
  std::vector<model::LowRank> at(int64_t layer, model::Site site) const override;
  model::MlpTerms mlp(const model::MlpInput& in) const override;
  bool mlp_takes_text() const override;
  const std::vector<std::shared_ptr<Adapter>>& adapters() const { return adapters_; }

 private:
  std::vector<std::shared_ptr<Adapter>> adapters_;
};

}  // namespace moegraft::adapters
