#pragma once
// A family: how its config.json becomes a DecoderSpec and what its tensors are called on disk. One file each in
// families/, one row each in families.cpp.

#include <functional>
#include <string>
#include <vector>

#include "moegraft/io/json.h"
#include "moegraft/model/families.h"
#include "moegraft/model/spec.h"
#include "moegraft/model/tensors.h"

namespace moegraft::model {

struct Family {
  const char* model_type;
  io::Json defaults;  // fields that config.json may leave out, with the values of transformers' config class
  DecoderSpec (*parse)(const io::Json& config);  // config with the defaults filled in
  io::Json (*write)(const DecoderSpec& spec);    // the config.json that transformers reads
  // Of a base from scratch: fills in what the architecture says, given its sizes. UserError: sizes that it cannot have.
  void (*complete)(DecoderSpec& spec);
  TensorTable tensors = decoder_tensors();
  // A layer's experts as one tensor each, accepted where the tensors of single experts are absent: [E, 2F, D] gate rows
  // first, and [E, D, F].
  std::string fused_gate_up = "model.layers.{l}.mlp.experts.gate_up_proj",
              fused_down = "model.layers.{l}.mlp.experts.down_proj";
  // A layer's modules in transformers as PEFT names them; q_proj and its like, and a dense FFN's, have the names of
  // their tensors.
  std::string peft_gate_up = "mlp.experts.gate_up_proj", peft_down = "mlp.experts.down_proj";

  const TensorRow& row(TensorRole role) const { return row_of(tensors, role); }
  std::string name(TensorRole role, int64_t layer = 0, int64_t expert = 0) const {
    return tensor_name(row(role).name, layer, expert);
  }
};
// The same tensor as transformers also accepts it: saved from the model class without head (no "model." before the
// name), and each family's renamings.
std::vector<std::string> other_names(const std::string& name);

const Family& find_family(const std::string& model_type);  // UserError names the known ones

const Family& dots1_family();
const Family& llama_family();
const Family& mistral_family();
const Family& mixtral_family();
const Family& olmoe_family();
const Family& qwen2_moe_family();
const Family& qwen3_family();
const Family& qwen3_moe_family();

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
io::Json write_moe(const DecoderSpec& spec);  // and a router's fields
// A dense model: no layer has experts.
void make_dense(DecoderSpec& spec);
// Qwen's experts: their sizes, norm_topk_prob, and which layers have them (decoder_sparse_step, mlp_only_layers).
void read_qwen_experts(const ConfigReader& c, DecoderSpec& spec);
void write_qwen_experts(const DecoderSpec& spec, io::Json& config);
// A window (0: none) in the layers that layer_types names, or else in those for which slides(layer) holds.
void read_sliding_window(const ConfigReader& c, DecoderSpec& spec, int64_t window,
                         const std::function<bool(int64_t)>& slides);
int64_t used_window(const ConfigReader& c);  // sliding_window where use_sliding_window is on
void write_sliding_window(const DecoderSpec& spec, io::Json& config);
void check_spec(const DecoderSpec& spec);  // UserError on impossible sizes, and on what the decoder does not compute

}  // namespace moegraft::model
