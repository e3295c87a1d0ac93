// Qwen3-MoE (transformers `qwen3_moe`): q/k norm per head, own head width, dense layers by decoder_sparse_step and
// mlp_only_layers, optional sliding window.
#include "../family.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 151936},
          {"hidden_size", 2048},
          {"intermediate_size", 6144},
          {"num_hidden_layers", 24},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 4},
          {"max_position_embeddings", 32768},
          {"rms_norm_eps", 1e-6},
          {"moe_intermediate_size", 768},
          {"num_experts_per_tok", 8},
          {"num_experts", 128},
          {"sliding_window", 4096},
          {"router_aux_loss_coef", 0.001}};
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  read_qwen_experts(c, s);
  s.qk_norm = QkNorm::per_head;
  s.qkv_bias = s.o_bias = c.boolean("attention_bias", false);
  for (LayerSpec& layer : s.layers) layer.sliding_window = used_window(c);
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_moe(s);
  j["architectures"] = {"Qwen3MoeForCausalLM"};
  j["head_dim"] = s.head_dim;
  j["attention_bias"] = s.o_bias;
  write_qwen_experts(s, j);
  const int64_t window = s.layers.empty() ? 0 : s.layers.front().sliding_window;
  j["use_sliding_window"] = window > 0;
  j["sliding_window"] = window > 0 ? io::Json(window) : io::Json(nullptr);
  return j;
}

void complete(DecoderSpec& s) { s.qk_norm = QkNorm::per_head; }

}  // namespace

const Family& qwen3_moe_family() {
  static const Family family{"qwen3_moe", defaults(), parse, write, complete};
  return family;
}

}  // namespace moegraft::model
