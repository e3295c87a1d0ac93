#include "moegraft/adapters/modality_lora.h"

#include "libtorch.h"

#include <algorithm>
#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::adapters {
namespace {

using model::Site;

const std::vector<std::pair<std::string, Site>>& sites() {
  static const std::vector<std::pair<std::string, Site>> table{{"q", Site::q},       {"k", Site::k},   {"v", Site::v},      {"o", Site::o},
                                                               {"gate", Site::gate}, {"up", Site::up}, {"down", Site::down}};
  return table;
}

}  // namespace

Site parse_site(const std::string& name) {
  std::vector<std::string> known;
  for (const auto& [text, site] : sites()) {
    if (text == name) return site;
    known.push_back(text);
  }
  fail<UsageError>("adapters: '", name, "' is not a site; sites: ", join(known, ", "));
}

const char* site_name(Site site) {
  for (const auto& [text, value] : sites())
    if (value == site) return text.c_str();
  return "?";
}

bool is_ffn_site(Site site) { return site == Site::gate || site == Site::up || site == Site::down; }

bool is_per_expert(const model::DecoderSpec& spec, Site site) { return is_ffn_site(site) && spec.has_experts(); }

bool has_site(const model::DecoderSpec& spec, int64_t layer, Site site) { return !is_per_expert(spec, site) || spec.layers[size_t(layer)].sparse; }

SiteShape site_shape(const model::DecoderSpec& s, Site site) {
  const int64_t q = s.num_heads * s.head_dim, kv = s.num_kv_heads * s.head_dim, ffn = s.has_experts() ? s.moe_intermediate_size : s.intermediate_size;
  switch (site) {
    case Site::q: return {s.hidden_size, q};
    case Site::k:
    case Site::v: return {s.hidden_size, kv};
    case Site::o: return {q, s.hidden_size};
    case Site::gate:
    case Site::up: return {s.hidden_size, ffn};
    case Site::down: return {ffn, s.hidden_size};
  }
  return {};
}

ModalityLora::ModalityLora(const model::DecoderSpec& spec, const AdapterConfig& config, int64_t index, std::vector<int64_t> modalities, at::Device device,
                           std::pair<int64_t, int64_t> experts)
    : config_(config),
      modalities_(std::move(modalities)),
      scale_(config.use_rslora ? config.alpha / std::sqrt(double(config.rank)) : config.alpha / double(config.rank)),
      first_expert_(experts.first),
      num_experts_(experts.second > 0 ? experts.second : spec.num_experts),
      total_experts_(spec.num_experts) {
  for (const int64_t l : config.layers)
    MOEGRAFT_CHECK_USAGE(l >= 0 && l < spec.num_layers, "adapters[", index, "].layers must be in [0, ", spec.num_layers - 1, "], got ", l);
  std::vector<Site> wanted;
  for (const auto& name : config.sites) {
    const Site site = parse_site(name);
    MOEGRAFT_CHECK_USAGE(std::find(wanted.begin(), wanted.end(), site) == wanted.end(), "adapters[", index, "].sites names ", name, " twice");
    wanted.push_back(site);
  }
  const auto leaf = [&](std::vector<int64_t> shape) { return at::zeros(shape, at::TensorOptions(at::kFloat).device(device)).set_requires_grad(true); };
  for (int64_t l = 0; l < spec.num_layers; ++l) {
    if (!config.layers.empty() && std::find(config.layers.begin(), config.layers.end(), l) == config.layers.end()) continue;
    for (const Site site : wanted) {
      if (!has_site(spec, l, site)) continue;
      const bool expert = is_per_expert(spec, site);
      const auto [in, out] = site_shape(spec, site);
      std::vector<int64_t> a{config.rank, in}, b{out, config.rank};
      if (expert) a.insert(a.begin(), num_experts_), b.insert(b.begin(), num_experts_);
      index_[{l, int(site)}] = factors_.size();
      factors_.push_back({l, site, "adapters." + std::to_string(index) + ".layers." + std::to_string(l) + "." + site_name(site), leaf(a), leaf(b)});
    }
  }
  MOEGRAFT_CHECK_USAGE(!factors_.empty(), "adapters[", index, "] has no site on any layer");
}

std::vector<model::LowRank> ModalityLora::at(int64_t layer, Site site) const {
  const auto it = index_.find({layer, int(site)});
  if (it == index_.end()) return {};
  const Factor& f = factors_[it->second];
  return {{f.A, f.B, scale_, modalities_}};
}

void ModalityLora::register_parameters(model::ParameterRegistry& registry, const std::string& provenance) const {
  for (const Factor& f : factors_) {
    const bool expert = f.A.dim() == 3;
    const std::string sharding = expert ? "expert" : "replicated";
    const int64_t total = expert && num_experts_ < total_experts_ ? total_experts_ : 0, first = total > 0 ? first_expert_ : 0;
    registry.add({f.name + ".A", f.A, "lora", join(config_.modality, ","), sharding, provenance, first, total});
    registry.add({f.name + ".B", f.B, "lora", join(config_.modality, ","), sharding, "zero", first, total});
  }
}

std::vector<model::LowRank> AdapterStack::at(int64_t layer, Site site) const {
  std::vector<model::LowRank> out;
  for (const auto& adapter : adapters_)
    for (auto& term : adapter->at(layer, site)) out.push_back(std::move(term));
  return out;
}

}  // namespace moegraft::adapters
