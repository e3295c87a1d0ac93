// Llama and Mistral (transformers `llama`, `mistral`), dense: Llama 2 and 3, SmolLM2, Mistral 7B and their kin. Llama
// may have biases on attention and FFN, Mistral a sliding window.
#include "../family.h"

namespace moegraft::model {
namespace {

io::Json llama_defaults() {
  return {{"vocab_size", 32000},     {"hidden_size", 4096},       {"intermediate_size", 11008},
          {"num_hidden_layers", 32}, {"num_attention_heads", 32}, {"max_position_embeddings", 2048},
          {"rms_norm_eps", 1e-6},    {"bos_token_id", 1},         {"eos_token_id", 2}};
}

io::Json mistral_defaults() {
  return {{"vocab_size", 32000},
          {"hidden_size", 4096},
          {"intermediate_size", 14336},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 8},
          {"max_position_embeddings", 131072},
          {"rms_norm_eps", 1e-6},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"sliding_window", 4096}};
}

DecoderSpec parse_llama(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  s.qkv_bias = s.o_bias = c.boolean("attention_bias", false);
  s.mlp_bias = c.boolean("mlp_bias", false);
  make_dense(s);
  return s;
}

DecoderSpec parse_mistral(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  for (LayerSpec& layer : s.layers) layer.sliding_window = c.integer("sliding_window", 0);
  make_dense(s);
  return s;
}

io::Json write_llama(const DecoderSpec& s) {
  io::Json j = write_common(s);
  j["architectures"] = {"LlamaForCausalLM"};
  j["head_dim"] = s.head_dim;
  j["attention_bias"] = s.o_bias;
  j["mlp_bias"] = s.mlp_bias;
  return j;
}

io::Json write_mistral(const DecoderSpec& s) {
  io::Json j = write_common(s);
  j["architectures"] = {"MistralForCausalLM"};
  j["head_dim"] = s.head_dim;
  const int64_t window = s.layers.empty() ? 0 : s.layers.front().sliding_window;
  j["sliding_window"] = window > 0 ? io::Json(window) : io::Json(nullptr);
  return j;
}

}  // namespace

const Family& llama_family() {
  static const Family family{"llama", llama_defaults(), parse_llama, write_llama, make_dense};
  return family;
}

const Family& mistral_family() {
  static const Family family{"mistral", mistral_defaults(), parse_mistral, write_mistral, make_dense};
  return family;
}

}  // namespace moegraft::model
