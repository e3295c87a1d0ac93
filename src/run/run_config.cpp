#include "moegraft/adapters/sites.h"
#include "moegraft/run/run_config.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "moegraft/base/text.h"

namespace moegraft::run {
namespace {

using model::Offload;
using train::BaseWeights;

std::vector<std::string> names_of(const std::map<std::string, graft::ModalityConfig>& modalities) {
  std::vector<std::string> names;
  for (const auto& [name, modality] : modalities) names.push_back(name);
  return names;
}

// Whether `inner` is `outer` or lies in it.
bool lies_in(const std::string& inner, const std::string& outer) {
  std::error_code none;
  const auto a = std::filesystem::weakly_canonical(inner, none), b = std::filesystem::weakly_canonical(outer, none);
  return !none && std::mismatch(b.begin(), b.end(), a.begin(), a.end()).first == b.end();
}

void check_model(const RunConfig& c) {
  MOEGRAFT_CHECK_USAGE(c.model.path.empty() || c.run.dir.empty() || !lies_in(c.run.dir, c.model.path), "run.dir (",
                       c.run.dir, ") is the base's own folder or lies in it: name another folder for the run");
  MOEGRAFT_CHECK_USAGE(c.model.offload == Offload::none || c.train.base_weights == BaseWeights::frozen,
                       "model.offload: experts needs a frozen base; train.base_weights is full");
  MOEGRAFT_CHECK_USAGE(c.model.quantize == model::Quantize::none || c.train.base_weights == BaseWeights::frozen,
                       "model.quantize: ", config::name_of(c.model.quantize),
                       " needs a frozen base; train.base_weights is full");
  MOEGRAFT_CHECK_USAGE(c.model.quantize == model::Quantize::none || !c.parallel.shard_base,
                       "model.quantize: ", config::name_of(c.model.quantize),
                       " and parallel.shard_base do not go together: quantised experts stay where they compute");
  if (!c.model.init) return;
  MOEGRAFT_CHECK_USAGE(c.data.sequence_length <= c.model.init->max_positions,
                       "data.sequence_length must not exceed model.init.max_positions (", c.model.init->max_positions,
                       "), got ", c.data.sequence_length);
  MOEGRAFT_CHECK_USAGE(c.train.base_weights == BaseWeights::full,
                       "model.init makes random weights that only train.base_weights: full trains, got ",
                       config::name_of(c.train.base_weights));
}

void check_modalities(const RunConfig& c) {
  std::map<std::string, std::string> owner;  // token name -> key
  for (const auto& [name, modality] : c.modalities) {
    const std::string key = "modalities." + name;
    MOEGRAFT_CHECK_USAGE(!name.empty() && name != "text", "modalities: \"", name,
                         "\" cannot name a new modality: text is the base's own");
    MOEGRAFT_CHECK_USAGE(name.find(',') == std::string::npos, "modalities: \"", name,
                         "\" cannot name a modality: shards list them with commas between");
    for (const auto& [field, token] :
         {std::pair(key + ".begin", modality.begin), std::pair(key + ".end", modality.end)}) {
      MOEGRAFT_CHECK_USAGE(!token.empty(), field, " must not be empty");
      const auto [at, fresh] = owner.emplace(token, field);
      MOEGRAFT_CHECK_USAGE(fresh, field, " must differ from ", at->second, ": both are ", token);
    }
  }
}

void check_adapters(const RunConfig& c) {
  static const std::vector<std::string> sites = adapters::known_sites();
  for (size_t i = 0; i < c.adapters.size(); ++i) {
    const auto& adapter = c.adapters[i];
    const std::string key = "adapters[" + std::to_string(i) + "]";
    MOEGRAFT_CHECK_USAGE(!adapter.modality.empty(), key, ".modality must name at least one modality");
    std::set<std::string> seen;
    for (const auto& name : adapter.modality) {
      MOEGRAFT_CHECK_USAGE(seen.insert(name).second, key, ".modality names ", name, " twice");
      if (name == "text") {
        MOEGRAFT_CHECK_USAGE(
            c.train.allow_text_drift, key,
            ".modality: an adapter on text changes text logits; set train.allow_text_drift: true to permit it");
      } else if (!c.modalities.contains(name)) {
        const auto known = names_of(c.modalities);
        const auto nearest = nearest_word(name, known);
        fail<UsageError>(key, ".modality: no modality \"", name, "\" in `modalities`",
                         nearest.empty() ? "" : ", did you mean " + nearest + "?",
                         known.empty() ? " (it is empty)" : " (known: " + join(known, ", ") + ")");
      }
    }
    MOEGRAFT_CHECK_USAGE(!adapter.sites.empty(), key, ".sites must name at least one of ", join(sites, ", "));
    seen.clear();
    for (const auto& site : adapter.sites) {
      MOEGRAFT_CHECK_USAGE(std::find(sites.begin(), sites.end(), site) != sites.end(), key, ".sites must be among ",
                           join(sites, ", "), ", got ", site);
      MOEGRAFT_CHECK_USAGE(seen.insert(site).second, key, ".sites names ", site, " twice");
    }
    std::set<int64_t> layers;
    for (const int64_t layer : adapter.layers)
      MOEGRAFT_CHECK_USAGE(layer >= 0 && layers.insert(layer).second, key,
                           ".layers must be distinct indices from 0, got ", adapter.layers);
    MOEGRAFT_CHECK_USAGE(adapter.alpha > 0 || adapter.kind != adapters::AdapterKind::modality_lora, key,
                         ".alpha must be above 0 (an adapter of scale 0 learns nothing), got ", adapter.alpha);
  }
}

void check_data(const RunConfig& c) {
  const auto& data = c.data;
  MOEGRAFT_CHECK_USAGE(!data.train.empty(), "data.train must name at least one source");
  for (const auto& [key, sources] : {std::pair("data.train", &data.train), std::pair("data.eval", &data.eval)}) {
    double total = 0;
    for (const auto& source : *sources) total += source.weight;
    MOEGRAFT_CHECK_USAGE(sources->empty() || total > 0, key, ": at least one weight must be above 0");
  }
  for (const auto& [key, share] :
       {std::pair("caption_noise", data.caption_noise), std::pair("code_noise", data.code_noise)})
    MOEGRAFT_CHECK_USAGE(share == 0 || !c.modalities.empty(), "data.", key,
                         " is for training another modality: give `modalities`, or leave it out");
  MOEGRAFT_CHECK_USAGE(data.sequence_length <= data.tokens_per_step, "data.sequence_length (", data.sequence_length,
                       ") must fit data.tokens_per_step (", data.tokens_per_step,
                       "): raise tokens_per_step or lower sequence_length");
}

void check_parallel(const RunConfig& c) {
  const auto& p = c.parallel;
  const bool frozen = c.train.base_weights == BaseWeights::frozen;
  MOEGRAFT_CHECK_USAGE(p.expert == 1 || frozen, "parallel.expert: ", p.expert,
                       " needs a frozen base; train.base_weights is full (data parallelism trains it)");
  MOEGRAFT_CHECK_USAGE(!p.shard_base || frozen, "parallel.shard_base needs a frozen base; train.base_weights is full");
  MOEGRAFT_CHECK_USAGE(!p.shard_base || c.model.offload == Offload::none,
                       "parallel.shard_base and model.offload: ", config::name_of(c.model.offload),
                       " are two places for the same experts: choose one");
}

void check_train(const RunConfig& c) {
  const auto& train = c.train;
  MOEGRAFT_CHECK_USAGE(train.base_weights == BaseWeights::frozen || c.model.init || train.allow_text_drift,
                       "train.base_weights: full changes text logits; it needs model.init (training from scratch) or "
                       "train.allow_text_drift: true");
  MOEGRAFT_CHECK_USAGE(train.base_weights == BaseWeights::full || !c.modalities.empty() || !c.adapters.empty(),
                       "nothing trains: give `modalities` and `adapters`, or train.base_weights: full with model.init");
  MOEGRAFT_CHECK_USAGE(train.eval_every == 0 || !c.data.eval.empty(), "train.eval_every is ", train.eval_every,
                       " but data.eval names no source");
}

}  // namespace

std::vector<config::MovedKey> RunConfig::moved_keys() {
  // Either key could ask for bfloat16.
  const auto dtype = [](const std::string& precision, const std::string& present) -> std::string {
    return precision == "bf16" ? "bfloat16" : present.empty() ? precision : present;
  };
  return {{"train.precision", "model.dtype", dtype}};
}

void RunConfig::validate(const std::string&) const {
  check_model(*this);
  check_modalities(*this);
  check_adapters(*this);
  check_data(*this);
  check_train(*this);
  check_parallel(*this);
}

}  // namespace moegraft::run
