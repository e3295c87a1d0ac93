#pragma once
// A family: how its config.json becomes a DecoderSpec and what its tensors are called on disk. One file each in families/, one row each in families.cpp.

#include <string>
#include <vector>

#include "moegraft/io/json.h"
#include "moegraft/model/spec.h"

namespace moegraft::model {

// Patterns: {l} layer, {e} expert.
struct TensorNames {
  std::string embedding = "model.embed_tokens.weight", head = "lm_head.weight", final_norm = "model.norm.weight";
  std::string input_norm = "model.layers.{l}.input_layernorm.weight", post_norm = "model.layers.{l}.post_attention_layernorm.weight";
  std::string attention = "model.layers.{l}.self_attn.";  // + q_proj.weight, q_norm.weight, …
  std::string dense = "model.layers.{l}.mlp.";            // + gate_proj.weight, …
  std::string router = "model.layers.{l}.mlp.gate.weight";
  std::string expert_gate = "model.layers.{l}.mlp.experts.{e}.gate_proj.weight", expert_up = "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
              expert_down = "model.layers.{l}.mlp.experts.{e}.down_proj.weight";
  // The in-memory fused form, accepted when the per-expert one is absent: [E, 2F, D] gate rows first, and [E, D, F].
  std::string fused_gate_up = "model.layers.{l}.mlp.experts.gate_up_proj", fused_down = "model.layers.{l}.mlp.experts.down_proj";
};
std::string tensor_name(const std::string& pattern, int64_t layer, int64_t expert = 0);

struct Family {
  const char* model_type;
  io::Json defaults;  // fields that config.json may leave out, with the values of transformers' config class
  DecoderSpec (*parse)(const io::Json& config);  // config with the defaults filled in
  io::Json (*write)(const DecoderSpec& spec);  // the config.json that transformers reads
  TensorNames names;
};
// The same tensor as transformers also accepts it: saved from the model class without head (no "model." before the name), and each family's renamings.
std::vector<std::string> other_names(const std::string& name);

const Family& find_family(const std::string& model_type);  // UserError names the known ones

const Family& olmoe_family();
const Family& qwen3_moe_family();
const Family& mixtral_family();

// Reads typed values with the key named in errors. null counts as absent.
class ConfigReader {
 public:
  explicit ConfigReader(const io::Json& config) : config_(config) {}
  bool has(const char* key) const { return config_.contains(key) && !config_.at(key).is_null(); }
  int64_t integer(const char* key) const;
  int64_t integer(const char* key, int64_t fallback) const { return has(key) ? integer(key) : fallback; }
  // The first key that is present: both spellings of a field, the one that wins in transformers first.
  int64_t integer_of(std::initializer_list<const char*> keys) const;
  double number(const char* key, double fallback) const;
  bool boolean(const char* key, bool fallback) const;
  std::string string(const char* key, const std::string& fallback) const;
  const io::Json& raw(const char* key) const { return config_.at(key); }

 private:
  const io::Json& config_;
};

// Fields that every family spells alike: sizes, ids, rope in both spellings, tying.
DecoderSpec parse_common(const io::Json& config);
io::Json write_common(const DecoderSpec& spec);
void check_spec(const DecoderSpec& spec);  // UserError on impossible sizes

}  // namespace moegraft::model
