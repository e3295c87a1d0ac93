// The table of families, and what their configs have in common.
#include <algorithm>
#include <cmath>

#include "family.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/model/weights.h"

namespace moegraft::model {
namespace {

const std::vector<const Family*>& families() {
  static const std::vector<const Family*> table{&dots1_family(),   &llama_family(),    &mistral_family(),
                                                &mixtral_family(), &olmoe_family(),    &qwen2_moe_family(),
                                                &qwen3_family(),   &qwen3_moe_family()};
  return table;
}

// A value in an error text.
std::string show(const io::Json& value) {
  return shortened(value.dump(-1, ' ', false, io::Json::error_handler_t::replace));
}

int64_t special_id(const ConfigReader& c, const char* key) {
  if (!c.has(key)) return -1;
  const auto& value = c.raw(key);
  const bool ids = value.is_number_integer() ||
                   (value.is_array() &&
                    std::all_of(value.begin(), value.end(), [](const io::Json& id) { return id.is_number_integer(); }));
  MOEGRAFT_CHECK(ids, "config.json: ", key, " must be an id or a list of ids, got ", show(value));
  if (value.is_array())
    return value.empty() ? -1 : value.front().get<int64_t>();  // several eos ids: the first ends documents, all end a
                                                               // generated text (stop_ids.h)
  return c.integer(key);
}

// transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling (with "type" or "rope_type").
RopeSpec parse_rope(const ConfigReader& c, int64_t max_positions) {
  RopeSpec r;
  r.theta = c.number("rope_theta", 10000.0);
  r.partial_factor = c.number("partial_rotary_factor", 1.0);
  // With both, rope_scaling is the one (unless it is empty), and what the object holds goes before the field outside of
  // it.
  const char* key = c.has("rope_scaling") && !c.raw("rope_scaling").empty() ? "rope_scaling" : "rope_parameters";
  if (!c.has(key)) return r;
  const io::Json& j = c.raw(key);
  MOEGRAFT_CHECK(j.is_object(), "config.json: ", key, " must be an object, got ", j.type_name());
  const ConfigReader p(j);
  r.theta = p.number("rope_theta", r.theta);
  r.type = p.string("rope_type", p.string("type", "default"));
  const std::vector<std::string> known{"default", "linear", "dynamic", "yarn", "llama3"};
  MOEGRAFT_CHECK(std::find(known.begin(), known.end(), r.type) != known.end(), "config.json: rope type '", r.type,
                 "' is not supported; known: ", join(known, ", "));
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
  r.partial_factor = p.number("partial_rotary_factor", r.partial_factor);
  return r;
}

}  // namespace

std::vector<std::string> other_names(const std::string& name) {
  std::vector<std::string> out;
  const std::string model = "model.", block = ".block_sparse_moe.";
  const auto both = [&](const std::string& n) {
    if (n != name) out.push_back(n);
    out.push_back(n.starts_with(model) ? n.substr(model.size()) : model + n);
  };
  both(name);
  if (const size_t at = name.find(block); at != std::string::npos)
    both(std::string(name).replace(at, block.size(), ".mlp."));
  return out;
}

const Family& find_family(const std::string& model_type) {
  for (const Family* f : families())
    if (model_type == f->model_type) return *f;
  fail<UserError>("config.json: model_type '", shortened(model_type),
                  "' is not a supported family; supported: ", join(known_families(), ", "));
}

std::vector<std::string> known_families() {
  std::vector<std::string> names;
  for (const Family* f : families()) names.emplace_back(f->model_type);
  return names;
}

DecoderSpec complete_spec(DecoderSpec sizes) {
  find_family(sizes.family).complete(sizes);
  check_spec(sizes);
  return sizes;
}

PeftModule peft_module(const DecoderSpec& spec, Site site) {
  const Family& family = find_family(spec.family);
  const auto module = [&](TensorRole role) {
    std::string name = family.row(role).name;
    for (const std::string& end : {std::string("model.layers.{l}."), std::string(".weight")})
      name.erase(name.find(end), end.size());
    return name;
  };
  switch (site) {
    case Site::q: return {module(TensorRole::q)};
    case Site::k: return {module(TensorRole::k)};
    case Site::v: return {module(TensorRole::v)};
    case Site::o: return {module(TensorRole::o)};
    case Site::gate:
      return spec.has_experts() ? PeftModule{family.peft_gate_up} : PeftModule{module(TensorRole::dense_gate)};
    case Site::up:
      return spec.has_experts() ? PeftModule{family.peft_gate_up, true} : PeftModule{module(TensorRole::dense_up)};
    case Site::router: break;
    case Site::down: return {spec.has_experts() ? family.peft_down : module(TensorRole::dense_down)};
  }
  fail<UserError>("PEFT's LoRA has no place for an adapter on the router; leave site router out to export");
}

void make_dense(DecoderSpec& s) {
  for (LayerSpec& layer : s.layers) layer.sparse = false;
  s.num_experts = s.num_experts_per_tok = s.moe_intermediate_size = 0;
  s.router_aux_loss_coef = 0;
}

void read_qwen_experts(const ConfigReader& c, DecoderSpec& s) {
  s.num_experts = c.integer_of({"num_local_experts", "num_experts"});
  s.num_experts_per_tok = c.integer("num_experts_per_tok");
  s.moe_intermediate_size = c.integer("moe_intermediate_size");
  s.router.renormalise = c.boolean("norm_topk_prob", false);
  const int64_t step = c.integer("decoder_sparse_step", 1);
  std::vector<int64_t> dense;
  if (c.has("mlp_only_layers")) dense = c.raw("mlp_only_layers").get<std::vector<int64_t>>();
  for (int64_t l = 0; l < s.num_layers; ++l)
    s.layers[l].sparse =
        s.num_experts > 0 && step > 0 && (l + 1) % step == 0 && std::find(dense.begin(), dense.end(), l) == dense.end();
}

void write_qwen_experts(const DecoderSpec& s, io::Json& config) {
  config["num_experts"] = s.num_experts;
  config["moe_intermediate_size"] = s.moe_intermediate_size;
  config["norm_topk_prob"] = s.router.renormalise;
  config["decoder_sparse_step"] = 1;
  config["mlp_only_layers"] = io::Json::array();
  for (int64_t l = 0; l < s.num_layers; ++l)
    if (!s.layers[l].sparse) config["mlp_only_layers"].push_back(l);
}

int64_t used_window(const ConfigReader& c) {
  return c.boolean("use_sliding_window", false) ? c.integer("sliding_window", 0) : 0;
}

void read_sliding_window(const ConfigReader& c, DecoderSpec& s, int64_t window,
                         const std::function<bool(int64_t)>& slides) {
  std::vector<std::string> types;
  if (c.has("layer_types")) {
    types = c.raw("layer_types").get<std::vector<std::string>>();
    MOEGRAFT_CHECK(int64_t(types.size()) == s.num_layers, "config.json: layer_types must name ", s.num_layers,
                   " layers, got ", types.size());
    for (const auto& type : types)
      MOEGRAFT_CHECK(type == "full_attention" || type == "sliding_attention",
                     "config.json: layer_types may hold full_attention and sliding_attention, got '", shortened(type),
                     "'");
  }
  for (int64_t l = 0; l < s.num_layers; ++l)
    if (types.empty() ? slides(l) : types[size_t(l)] == "sliding_attention") s.layers[l].sliding_window = window;
}

void write_sliding_window(const DecoderSpec& s, io::Json& config) {
  int64_t window = 0;
  io::Json types = io::Json::array();
  for (const LayerSpec& layer : s.layers) {
    window = std::max(window, layer.sliding_window);
    types.push_back(layer.sliding_window > 0 ? "sliding_attention" : "full_attention");
  }
  config["use_sliding_window"] = window > 0;
  config["sliding_window"] = window > 0 ? io::Json(window) : io::Json(nullptr);
  config["layer_types"] = types;
}

int64_t ConfigReader::integer(const char* key) const {
  MOEGRAFT_CHECK(has(key), "config.json: ", key, " is missing");
  MOEGRAFT_CHECK(config_.at(key).is_number_integer(), "config.json: ", key, " must be an integer, got ",
                 show(config_.at(key)));
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
  MOEGRAFT_CHECK(config_.at(key).is_boolean(), "config.json: ", key, " must be true or false, got ",
                 show(config_.at(key)));
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
  MOEGRAFT_CHECK(!c.has("quantization_config"),
                 "config.json: quantization_config is not supported; expected weights in float32, bfloat16 or float16: "
                 "dequantise them with transformers first");
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
  MOEGRAFT_CHECK(activation == "silu" || activation == "swish", "config.json: hidden_act '", activation,
                 "' is not supported; expected silu");
  MOEGRAFT_CHECK(s.num_layers > 0 && s.num_layers <= 100000, "config.json: num_hidden_layers must be positive, got ",
                 s.num_layers);
  s.layers.resize(s.num_layers);
  return s;
}

void check_spec(const DecoderSpec& s) {
  const auto positive = [](const char* key, int64_t value) {
    MOEGRAFT_CHECK(value > 0 && value < (int64_t{1} << 31), "config.json: ", key, " must be in [1, 2^31), got ", value);
  };
  positive("vocab_size", s.vocab_size);
  positive("hidden_size", s.hidden_size);
  positive("num_attention_heads", s.num_heads);
  positive("num_key_value_heads", s.num_kv_heads);
  positive("head_dim", s.head_dim);
  MOEGRAFT_CHECK(s.num_heads % s.num_kv_heads == 0, "config.json: num_attention_heads ", s.num_heads,
                 " must be a multiple of num_key_value_heads ", s.num_kv_heads);
  MOEGRAFT_CHECK(s.head_dim % 2 == 0, "config.json: head_dim must be even for rotary embedding, got ", s.head_dim);
  MOEGRAFT_CHECK(std::isfinite(s.rms_norm_eps) && s.rms_norm_eps >= 0,
                 "config.json: rms_norm_eps must be 0 or more, got ", s.rms_norm_eps);
  MOEGRAFT_CHECK(std::isfinite(s.rope.theta) && s.rope.theta > 0, "config.json: rope_theta must be above 0, got ",
                 s.rope.theta);
  MOEGRAFT_CHECK(s.rope.partial_factor == 1.0, "config.json: partial_rotary_factor other than 1 is not supported");
  const RouterSpec& r = s.router;
  MOEGRAFT_CHECK(
      r.num_groups >= 1 && r.topk_groups >= 1 && r.topk_groups <= r.num_groups && s.num_experts % r.num_groups == 0,
      "config.json: ", s.num_experts, " experts cannot lie in ", r.num_groups, " groups of which ", r.topk_groups,
      " are chosen from");
  for (const auto& layer : s.layers) {
    MOEGRAFT_CHECK(layer.sliding_window >= 0, "config.json: sliding_window must be positive or null, got ",
                   layer.sliding_window);
    if (!layer.sparse) {
      positive("intermediate_size", s.intermediate_size);
      continue;
    }
    positive("number of experts", s.num_experts);
    positive("expert intermediate size", s.moe_intermediate_size);
    MOEGRAFT_CHECK(s.num_experts_per_tok >= 1 && s.num_experts_per_tok <= s.num_experts,
                   "config.json: num_experts_per_tok must be in [1, ", s.num_experts, "], got ", s.num_experts_per_tok);
  }
  // Far above any model, far below where counts in 64 bits overflow.
  const double D = double(s.hidden_size), ffn = double(s.num_experts) * double(s.moe_intermediate_size) +
                                                double(s.shared_expert.intermediate_size) + double(s.intermediate_size);
  const double parameters = 2.0 * double(s.vocab_size) * D +
                            double(s.num_layers) * (4.0 * D * double(s.num_heads) * double(s.head_dim) + 3.0 * D * ffn);
  MOEGRAFT_CHECK(parameters < 1e15, "config.json: its sizes make ", parameters,
                 " parameters, expected fewer than 1e15");
}

io::Json write_moe(const DecoderSpec& s) {
  io::Json j = write_common(s);
  j["num_experts_per_tok"] = s.num_experts_per_tok;
  j["router_aux_loss_coef"] = s.router_aux_loss_coef;
  return j;
}

io::Json write_common(const DecoderSpec& s) {
  const auto id = [](int64_t value) { return value < 0 ? io::Json(nullptr) : io::Json(value); };
  io::Json rope{{"rope_theta", s.rope.theta}, {"rope_type", s.rope.type}};
  if (s.rope.type != "default") rope["factor"] = s.rope.factor;
  if (s.rope.type == "llama3")
    rope["low_freq_factor"] = s.rope.low_freq_factor, rope["high_freq_factor"] = s.rope.high_freq_factor;
  if (s.rope.type == "llama3" || s.rope.type == "yarn")
    rope["original_max_position_embeddings"] = s.rope.original_max_positions;
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
          {"hidden_act", "silu"},
          {"max_position_embeddings", s.max_positions},
          {"initializer_range", s.initializer_range},
          {"rms_norm_eps", s.rms_norm_eps},
          {"rope_parameters", rope},
          {"rope_theta", s.rope.theta},
          {"tie_word_embeddings", s.tie_word_embeddings},
          {"attention_dropout", 0.0},
          {"use_cache", true},
          {"bos_token_id", id(s.bos_id)},
          {"eos_token_id", id(s.eos_id)},
          {"pad_token_id", id(s.pad_id)}};
}

}  // namespace moegraft::model
