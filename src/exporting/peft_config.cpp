#include "peft_config.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "moegraft/base/text.h"
#include "moegraft/run/run_dir.h"

namespace moegraft::exporting {
namespace {

using io::Json;

constexpr const char* kRequires = "token gating; a plain PEFT load acts on every token";

// 64 rather than 64.0 where it is whole: other readers want an integer.
Json number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return int64_t(value);
  return value;
}

// PEFT's usual short name: "q_proj", "mlp.experts.down_proj".
std::string short_name(const Target& t) { return t.experts ? t.module : t.module.substr(t.module.find('.') + 1); }

// Short names where every layer that has the module is adapted, full paths otherwise. (layers_to_transform acts on
// target_modules alone and cannot differ between projections.)
std::vector<std::string> target_names(const std::vector<Target>& targets, const model::DecoderSpec& spec,
                                      bool experts) {
  std::vector<std::string> names;
  std::set<std::string> modules;
  for (const Target& t : targets)
    if (t.experts == experts) modules.insert(t.module);
  const auto sparse =
      std::count_if(spec.layers.begin(), spec.layers.end(), [](const model::LayerSpec& l) { return l.sparse; });
  for (const std::string& module : modules) {
    std::vector<std::string> paths;
    std::string name;
    for (const Target& t : targets)
      if (t.module == module) paths.push_back(t.path()), name = short_name(t);
    if (int64_t(paths.size()) == (experts ? int64_t(sparse) : spec.num_layers)) paths = {name};
    names.insert(names.end(), paths.begin(), paths.end());
  }
  return names;
}

std::string escape(const std::string& name) {
  std::string out;
  for (const char c : name) out += c == '.' ? "\\." : std::string(1, c);
  return out;
}

// The ranks other than `r`, one regular expression per rank: PEFT warns of a pattern that matches no module (parameters
// do not count), so names of modules and of parameters share one.
std::map<int64_t, std::string> rank_patterns(const std::vector<Target>& targets, int64_t r) {
  std::map<std::string, std::set<int64_t>> ranks;
  for (const Target& t : targets) ranks[t.module].insert(t.rank);
  std::map<int64_t, std::set<std::string>> names;
  for (const Target& t : targets)
    if (t.rank != r) names[t.rank].insert(escape(ranks[t.module].size() == 1 ? short_name(t) : t.path()));
  std::map<int64_t, std::string> patterns;
  for (const auto& [rank, set] : names) patterns[rank] = "(" + join({set.begin(), set.end()}, "|") + ")";
  return patterns;
}

std::vector<int64_t> new_ids(const graft::GraftedModel& m) {
  std::vector<int64_t> ids;
  for (int64_t id = m.vocabulary.text_size; id < m.vocabulary.size(); ++id) ids.push_back(id);
  return ids;
}

}  // namespace

double common_scale(const std::vector<Target>& targets) {
  double scale = 0;
  for (const Target& t : targets)
    for (const Term& term : t.terms) scale = std::max(scale, term.scale);
  return scale > 0 ? scale : 1;
}

Json adapter_config(const graft::GraftedModel& m, const std::vector<Target>& targets, const std::string& base_name) {
  const auto& spec = m.decoder->spec();
  const double scale = common_scale(targets);
  int64_t r = targets.front().rank;
  for (const Target& t : targets) r = std::max(r, t.rank);
  Json ranks = Json::object(), alphas = Json::object();
  for (const auto& [rank, pattern] : rank_patterns(targets, r))
    ranks[pattern] = rank, alphas[pattern] = number(scale * double(rank));
  Json config{{"peft_type", "LORA"},
              {"peft_version", "0.21.2"},
              {"task_type", "CAUSAL_LM"},
              {"base_model_name_or_path", base_name},
              {"inference_mode", true},
              {"r", r},
              {"lora_alpha", number(scale * double(r))},
              {"use_rslora", false},
              {"use_dora", false},
              {"lora_dropout", 0.0},
              {"bias", "none"},
              {"fan_in_fan_out", false},
              {"target_modules", target_names(targets, spec, false)},
              {"target_parameters", target_names(targets, spec, true)},
              {"rank_pattern", ranks},
              {"alpha_pattern", alphas},
              {"modules_to_save", nullptr},
              {"layers_to_transform", nullptr},
              {"moegraft_gate", {{"gate", "modality"}, {"requires", kRequires}, {"details", "moegraft.json"}}}};
  if (m.is_graft()) {
    config["trainable_token_indices"] = {{"embed_tokens", new_ids(m)}};
    if (!spec.tie_word_embeddings) config["trainable_token_indices"]["lm_head"] = new_ids(m);
  }
  return config;
}

Json gating_marker(const graft::GraftedModel& m, const std::vector<Target>& targets, const std::string& base_name) {
  Json modalities = Json::array(), adapters = Json::array(), terms = Json::array();
  for (const auto& t : m.vocabulary.modalities) {
    Json entry{{"name", t.name},
               {"modality", t.modality},
               {"begin_id", t.begin_id()},
               {"end_id", t.end_id()},
               {"first_code_id", t.code_id(0)},
               {"num_codes", t.num_codes},
               {"item_length", t.item_length},
               {"codebooks", t.codebooks},
               {"first_id", t.first_id},
               {"num_rows", t.num_rows()}};
    if (m.config) {
      const auto it = m.config->modalities.find(t.name);
      if (it != m.config->modalities.end())
        entry["codec"] = it->second.codec, entry["begin"] = it->second.begin, entry["end"] = it->second.end;
    }
    modalities.push_back(std::move(entry));
  }
  for (const auto& a : m.adapters->adapters())
    adapters.push_back({{"kind", config::name_of(a->config().kind)},
                        {"modality", a->config().modality},
                        {"rank", a->config().rank},
                        {"scale", a->scale()},
                        {"sites", a->config().sites}});
  for (const Target& t : targets)
    for (const Term& term : t.terms)
      terms.push_back({{"target", t.path()},
                       {"adapter", term.adapter},
                       {"site", adapters::site_name(term.site)},
                       {"rank_begin", term.rank_begin},
                       {"rank_end", term.rank_begin + term.rank()},
                       {"rows", {term.out_begin, term.out_begin + term.B.size(-2)}}});
  return {{"format", "moegraft-peft"},
          {"version", 1},
          {"gate", "modality"},
          {"requires", kRequires},
          {"base_model", base_name},
          {"family", m.decoder->spec().family},
          {"step", m.step},
          {"base_vocab_size", m.vocabulary.text_size},
          {"vocab_size", m.vocabulary.size()},
          {"tied", m.decoder->spec().tie_word_embeddings},
          {"modalities", modalities},
          {"adapters", adapters},
          {"terms", terms},
          {"fingerprints", m.path.empty() ? run::Fingerprints() : run::recorded_fingerprints(m.path)}};
}

std::string readme(const graft::GraftedModel& m, const std::string& base_name) {
  std::string names, resize;
  for (const auto& t : m.vocabulary.modalities)
    names += "- `" + t.name + "`: begin " + std::to_string(t.begin_id()) + ", end " + std::to_string(t.end_id()) +
             ", codes " + std::to_string(t.code_id(0)) + " to " + std::to_string(t.code_id(t.num_codes - 1)) + ", " +
             std::to_string(t.item_length) + " codes per item" +
             (t.codebooks > 1 ? ", place i of it from codebook i mod " + std::to_string(t.codebooks) + " (" +
                                    std::to_string(t.codebook_size()) + " codes each)"
                              : "") +
             "\n";
  if (m.is_graft())
    resize = "base.resize_token_embeddings(" + std::to_string(m.vocabulary.size()) +
             ", mean_resizing=False)  # first: PEFT accepts ids beyond the vocabulary silently\n";
  return "# A modality grafted onto " + base_name +
         "\n\nLoRA on attention and experts and the rows of the new tokens, written by moegraft at step " +
         std::to_string(m.step) +
         ". Needs transformers 5 and PEFT 0.19.1 or later (tried with 0.21.2).\n\n```python\nimport torch\nfrom peft "
         "import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
         "base = AutoModelForCausalLM.from_pretrained(\"" +
         base_name + "\", dtype=torch.float32)\n" + resize +
         "model = PeftModel.from_pretrained(base, \"path/to/this/folder\").eval()\n```\n\n"
         "**The gate is not in this file.** In moegraft the adapter acts on tokens of the new modality alone and text "
         "stays as it was. PEFT has no such gate: loaded as above, the\n"
         "adapter acts on every token (`moegraft logits RUN --gate all` computes the same). For plain text use `with "
         "model.disable_adapter():`, and do not merge the adapter into the\n"
         "base: text would change. `moegraft.json` records the gate, the token ids and which ranks belong to which "
         "site; `adapter_config.json` names it as `moegraft_gate`, which PEFT\n"
         "reports as an unexpected key and ignores. PEFT may also say that a `rank_pattern` matched no module when "
         "only experts are adapted: it looks at modules, the ranks of expert\n"
         "parameters are applied.\n\nNew tokens (ids; " +
         std::to_string(m.vocabulary.text_size) + " is the base's vocabulary size):\n\n" + names;
}

}  // namespace moegraft::exporting
