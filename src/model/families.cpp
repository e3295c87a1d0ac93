// The table of families, and what their configs have in common.
#include <algorithm>

#include "family.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/model/weights.h"

namespace moegraft::model {
namespace {

const std::vector<const Family*>& families() {
  static const std::vector<const Family*> table{&mixtral_family(), &olmoe_family(), &qwen3_moe_family()};
  return table;
}

// A value in an error text.
std::string show(const io::Json& value) { return shortened(value.dump(-1, ' ', false, io::Json::error_handler_t::replace)); }

int64_t special_id(const ConfigReader& c, const char* key) {
  if (!c.has(key)) return -1;
  const auto& value = c.raw(key);
  const bool ids = value.is_number_integer() || (value.is_array() && std::all_of(value.begin(), value.end(), [](const io::Json& id) { return id.is_number_integer(); }));
  MOEGRAFT_CHECK(ids, "config.json: ", key, " must be an id or a list of ids, got ", show(value));
  if (value.is_array()) return value.empty() ? -1 : value.front().get<int64_t>();  // several eos ids: the first ends documents, all end a generated text (stop_ids.h)
  return c.integer(key);
}

// transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling (with "type" or "rope_type").
RopeSpec parse_rope(const ConfigReader& c, int64_t max_positions) {
  RopeSpec r;
  r.theta = c.number("rope_theta", 10000.0);
  MOEGRAFT_CHECK(c.number("partial_rotary_factor", 1.0) == 1.0, "config.json: partial_rotary_factor other than 1 is not supported");
  // With both, rope_scaling is the one (unless it is empty), and what the object holds goes before the field outside of it.
  const char* key = c.has("rope_scaling") && !c.raw("rope_scaling").empty() ? "rope_scaling" : "rope_parameters";
  if (!c.has(key)) return r;
  const io::Json& j = c.raw(key);
  MOEGRAFT_CHECK(j.is_object(), "config.json: ", key, " must be an object, got ", j.type_name());
  const ConfigReader p(j);
  r.theta = p.number("rope_theta", r.theta);
  r.type = p.string("rope_type", p.string("type", "default"));
  const std::vector<std::string> known{"default", "linear", "dynamic", "yarn", "llama3"};
  MOEGRAFT_CHECK(std::find(known.begin(), known.end(), r.type) != known.end(), "config.json: rope type '", r.type, "' is not supported; known: ", join(known, ", "));
  r.factor = p.number("factor", 1.0);
  r.low_freq_factor = p.number("low_freq_factor", 1.0);
  r.high_freq_factor = p.number("high_freq_factor", 4.0);
  r.beta_fast = p.number("beta_fast", 32.0);
  r.beta_slow = p.number("beta_slow", 1.0);
  r.attention_factor = p.number("attention_factor", 0.0);
  r.mscale = p.number("mscale", 0.0);
  r.mscale_all_dim = p.number("mscale_all_dim", 0.0);
  r.truncate = p.boolean("truncate", true);
  r.original_max_positions = p.integer("original_max_position_embeddings", max_positions);
  MOEGRAFT_CHECK(p.number("partial_rotary_factor", 1.0) == 1.0, "config.json: partial_rotary_factor other than 1 is not supported");
  return r;
}

}  // namespace

std::string tensor_name(const std::string& pattern, int64_t layer, int64_t expert) {
  std::string out = pattern;
  const auto replace = [&](const char* key, int64_t value) {
    if (const size_t at = out.find(key); at != std::string::npos) out.replace(at, 3, std::to_string(value));
  };
  replace("{l}", layer);
  replace("{e}", expert);
  return out;
}

std::vector<std::string> other_names(const std::string& name) {
  std::vector<std::string> out;
  const std::string model = "model.", block = ".block_sparse_moe.";
  const auto both = [&](const std::string& n) {
    if (n != name) out.push_back(n);
    out.push_back(n.starts_with(model) ? n.substr(model.size()) : model + n);
  };
  both(name);
  if (const size_t at = name.find(block); at != std::string::npos) both(std::string(name).replace(at, block.size(), ".mlp."));
  return out;
}

const Family& find_family(const std::string& model_type) {
  for (const Family* f : families())
    if (model_type == f->model_type) return *f;
  const bool dense = model_type == "llama" || model_type == "mistral" || model_type == "qwen3";
  fail<UserError>("config.json: model_type '", shortened(model_type), "' is not a supported family; supported: ", join(known_families(), ", "),
                  dense ? "; a dense model becomes a mixture of experts with moegraft upcycle" : "");
}

std::vector<std::string> known_families() {
  std::vector<std::string> names;
  for (const Family* f : families()) names.emplace_back(f->model_type);
  return names;
}

int64_t ConfigReader::integer(const char* key) const {
  MOEGRAFT_CHECK(has(key), "config.json: ", key, " is missing");
  MOEGRAFT_CHECK(config_.at(key).is_number_integer(), "config.json: ", key, " must be an integer, got ", show(config_.at(key)));
  return config_.at(key).get<int64_t>();
}

int64_t ConfigReader::integer_of(std::initializer_list<const char*> keys) const {
  for (const char* key : keys)
    if (has(key)) return integer(key);
  return integer(*keys.begin());
}

double ConfigReader::number(const char* key, double fallback) const {
  if (!has(key)) return fallback;
  MOEGRAFT_CHECK(config_.at(key).is_number(), "config.json: ", key, " must be a number, got ", show(config_.at(key)));
  return config_.at(key).get<double>();
}

bool ConfigReader::boolean(const char* key, bool fallback) const {
  if (!has(key)) return fallback;
  MOEGRAFT_CHECK(config_.at(key).is_boolean(), "config.json: ", key, " must be true or false, got ", show(config_.at(key)));
  return config_.at(key).get<bool>();
}

std::string ConfigReader::string(const char* key, const std::string& fallback) const {
  if (!has(key)) return fallback;
  MOEGRAFT_CHECK(config_.at(key).is_string(), "config.json: ", key, " must be a string, got ", show(config_.at(key)));
  return config_.at(key).get<std::string>();
}

DecoderSpec parse_common(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s;
  s.family = c.string("model_type", "");
  MOEGRAFT_CHECK(!c.has("quantization_config"), "config.json: quantization_config is not supported; expected weights in float32, bfloat16 or float16: dequantise them with transformers first");
  s.vocab_size = c.integer("vocab_size");
  s.hidden_size = c.integer("hidden_size");
  s.num_layers = c.integer("num_hidden_layers");
  s.num_heads = c.integer("num_attention_heads");
  s.num_kv_heads = c.integer("num_key_value_heads", s.num_heads);
  MOEGRAFT_CHECK(s.num_heads > 0, "config.json: num_attention_heads must be positive, got ", s.num_heads);
  s.head_dim = c.integer("head_dim", s.hidden_size / s.num_heads);
  s.intermediate_size = c.integer("intermediate_size", 0);
  s.rms_norm_eps = c.number("rms_norm_eps", 1e-6);
  s.tie_word_embeddings = c.boolean("tie_word_embeddings", false);
  s.max_positions = c.integer("max_position_embeddings", 0);
  s.bos_id = special_id(c, "bos_token_id");
  s.eos_id = special_id(c, "eos_token_id");
  s.pad_id = special_id(c, "pad_token_id");
  s.router_aux_loss_coef = c.number("router_aux_loss_coef", 0.0);
  s.initializer_range = c.number("initializer_range", 0.02);
  s.rope = parse_rope(c, s.max_positions);
  const std::string activation = c.string("hidden_act", "silu");
  MOEGRAFT_CHECK(activation == "silu" || activation == "swish", "config.json: hidden_act '", activation, "' is not supported; expected silu");
  MOEGRAFT_CHECK(s.num_layers > 0 && s.num_layers <= 100000, "config.json: num_hidden_layers must be positive, got ", s.num_layers);
  s.layers.resize(s.num_layers);
  return s;
}

void check_spec(const DecoderSpec& s) {
  const auto positive = [](const char* key, int64_t value) { MOEGRAFT_CHECK(value > 0 && value < (int64_t{1} << 31), "config.json: ", key, " must be positive, got ", value); };
  positive("vocab_size", s.vocab_size);
  positive("hidden_size", s.hidden_size);
  positive("num_attention_heads", s.num_heads);
  positive("num_key_value_heads", s.num_kv_heads);
  positive("head_dim", s.head_dim);
  MOEGRAFT_CHECK(s.num_heads % s.num_kv_heads == 0, "config.json: num_attention_heads ", s.num_heads, " must be a multiple of num_key_value_heads ", s.num_kv_heads);
  MOEGRAFT_CHECK(s.head_dim % 2 == 0, "config.json: head_dim must be even for rotary embedding, got ", s.head_dim);
  for (const auto& layer : s.layers) {
    MOEGRAFT_CHECK(layer.sliding_window >= 0, "config.json: sliding_window must be positive or null, got ", layer.sliding_window);
    if (!layer.sparse) {
      positive("intermediate_size", s.intermediate_size);
      continue;
    }
    positive("number of experts", s.num_experts);
    positive("expert intermediate size", s.moe_intermediate_size);
    MOEGRAFT_CHECK(s.num_experts_per_tok >= 1 && s.num_experts_per_tok <= s.num_experts, "config.json: num_experts_per_tok must be in [1, ", s.num_experts, "], got ",
                   s.num_experts_per_tok);
  }
  // Far above any model, far below where counts in 64 bits overflow.
  const double D = double(s.hidden_size), ffn = s.num_experts > 0 ? double(s.num_experts) * double(s.moe_intermediate_size) : double(s.intermediate_size);
  const double parameters = 2.0 * double(s.vocab_size) * D + double(s.num_layers) * (4.0 * D * double(s.num_heads) * double(s.head_dim) + 3.0 * D * ffn);
  MOEGRAFT_CHECK(parameters < 1e15, "config.json: its sizes make ", parameters, " parameters, expected fewer than 1e15");
}

io::Json write_common(const DecoderSpec& s) {
  const auto id = [](int64_t value) { return value < 0 ? io::Json(nullptr) : io::Json(value); };
  io::Json rope{{"rope_theta", s.rope.theta}, {"rope_type", s.rope.type}};
  if (s.rope.type != "default") rope["factor"] = s.rope.factor;
  if (s.rope.type == "llama3") rope["low_freq_factor"] = s.rope.low_freq_factor, rope["high_freq_factor"] = s.rope.high_freq_factor;
  if (s.rope.type == "llama3" || s.rope.type == "yarn") rope["original_max_position_embeddings"] = s.rope.original_max_positions;
  if (s.rope.type == "yarn") {
    rope["beta_fast"] = s.rope.beta_fast;
    rope["beta_slow"] = s.rope.beta_slow;
    rope["truncate"] = s.rope.truncate;
    if (s.rope.attention_factor > 0) rope["attention_factor"] = s.rope.attention_factor;
    if (s.rope.mscale > 0) rope["mscale"] = s.rope.mscale, rope["mscale_all_dim"] = s.rope.mscale_all_dim;
  }
  return {{"model_type", s.family},
          {"vocab_size", s.vocab_size},
          {"hidden_size", s.hidden_size},
          {"intermediate_size", s.intermediate_size},
          {"num_hidden_layers", s.num_layers},
          {"num_attention_heads", s.num_heads},
          {"num_key_value_heads", s.num_kv_heads},
          {"num_experts_per_tok", s.num_experts_per_tok},
          {"hidden_act", "silu"},
          {"max_position_embeddings", s.max_positions},
          {"initializer_range", s.initializer_range},
          {"rms_norm_eps", s.rms_norm_eps},
          {"rope_parameters", rope},
          {"rope_theta", s.rope.theta},
          {"tie_word_embeddings", s.tie_word_embeddings},
          {"router_aux_loss_coef", s.router_aux_loss_coef},
          {"attention_dropout", 0.0},
          {"use_cache", true},
          {"bos_token_id", id(s.bos_id)},
          {"eos_token_id", id(s.eos_id)},
          {"pad_token_id", id(s.pad_id)}};
}

int64_t DecoderSpec::num_parameters() const {
  const int64_t D = hidden_size, q = num_heads * head_dim, kv = num_kv_heads * head_dim;
  int64_t total = vocab_size * D * (tie_word_embeddings ? 1 : 2) + D;
  for (const auto& layer : layers) {
    total += 2 * D + D * (q + 2 * kv) + q * D;
    if (attention_bias) total += q + 2 * kv + D;
    if (qk_norm == QkNorm::per_head) total += 2 * head_dim;
    if (qk_norm == QkNorm::full) total += q + kv;
    total += layer.sparse ? num_experts * D + num_experts * 3 * D * moe_intermediate_size : 3 * D * intermediate_size;
  }
  return total;
}

int64_t DecoderSpec::num_active_parameters() const {
  int64_t idle = 0;
  for (const auto& layer : layers)
    if (layer.sparse) idle += (num_experts - num_experts_per_tok) * 3 * hidden_size * moe_intermediate_size;
  return num_parameters() - idle;
}

}  // namespace moegraft::model
