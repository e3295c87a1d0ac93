#include "moegraft/adapters/adapter.h"

#include "libtorch.h"

#include <algorithm>
#include <iterator>

#include "moegraft/base/check.h"

namespace moegraft::adapters {

Adapter::Adapter(const AdapterContext& c)
    : config_(c.config),
      index_(c.index),
      modalities_(c.modalities),
      first_expert_(c.experts.first),
      num_experts_(c.experts.second > 0 ? c.experts.second : c.spec.num_experts),
      total_experts_(c.spec.num_experts) {
  for (const int64_t l : config_.layers)
    MOEGRAFT_CHECK_USAGE(l >= 0 && l < c.spec.num_layers, "adapters[", index_, "].layers must be in [0, ",
                         c.spec.num_layers - 1, "], got ", l);
  std::vector<model::Site> wanted;
  for (const auto& name : config_.sites) {
    const model::Site site = parse_site(name);
    MOEGRAFT_CHECK_USAGE(std::find(wanted.begin(), wanted.end(), site) == wanted.end(), "adapters[", index_,
                         "].sites names ", name, " twice");
    wanted.push_back(site);
  }
  for (int64_t l = 0; l < c.spec.num_layers; ++l) {
    if (!config_.layers.empty() && std::find(config_.layers.begin(), config_.layers.end(), l) == config_.layers.end())
      continue;
    for (const model::Site site : wanted)
      if (has_site(c.spec, l, site)) {
        place_of_[{l, site}] = positions_.size();
        positions_.push_back({l, site});
      }
  }
  MOEGRAFT_CHECK_USAGE(!positions_.empty(), "adapters[", index_, "] has no site on any layer");
}

std::vector<model::LowRank> Adapter::at(int64_t layer, model::Site site) const {
  const auto found = place_of_.find({layer, site});
  return found == place_of_.end() ? std::vector<model::LowRank>() : terms(found->second);
}

bool Adapter::mlp_takes_text() const {
  return std::find(modalities_.begin(), modalities_.end(), 0) != modalities_.end();
}

std::string Adapter::name_of(const Position& p) const {
  return "adapters." + std::to_string(index_) + ".layers." + std::to_string(p.layer) + "." + site_name(p.site);
}

const std::vector<Adapter::Factor>& Adapter::factors() const {
  static const std::vector<Factor> none;
  return none;
}

void Adapter::register_parameters(model::ParameterRegistry& registry) const {
  for (const Parameter& p : parameters()) {
    const int64_t total = p.per_expert && num_experts_ < total_experts_ ? total_experts_ : 0,
                  first = total > 0 ? first_expert_ : 0;
    registry.add({p.name, p.leaf, "lora", modalities_, p.layer,
                  p.per_expert ? model::Sharding::expert : model::Sharding::replicated, p.start, first, total});
  }
}

std::vector<model::LowRank> AdapterStack::at(int64_t layer, model::Site site) const {
  std::vector<model::LowRank> out;
  for (const auto& adapter : adapters_)
    for (auto& term : adapter->at(layer, site)) out.push_back(std::move(term));
  return out;
}

model::MlpTerms AdapterStack::mlp(const model::MlpInput& in) const {
  model::MlpTerms all;
  const auto append = [](auto& to, auto&& from) { std::move(from.begin(), from.end(), std::back_inserter(to)); };
  for (const auto& adapter : adapters_) {
    model::MlpTerms one = adapter->mlp(in);
    append(all.gate, one.gate), append(all.up, one.up), append(all.down, one.down);
    append(all.branches, one.branches), append(all.losses, one.losses);
  }
  return all;
}

bool AdapterStack::mlp_takes_text() const {
  return std::any_of(adapters_.begin(), adapters_.end(), [](const auto& adapter) { return adapter->mlp_takes_text(); });
}

}  // namespace moegraft::adapters
