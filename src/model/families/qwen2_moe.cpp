// Qwen2-MoE (transformers `qwen2_moe`: Qwen1.5-MoE, Qwen2-57B-A14B): biases on q, k and v, a shared expert behind a
// gate of its own, dense layers by decoder_sparse_step and mlp_only_layers, a sliding window in every other of the
// first max_window_layers.
#include "../family.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 151936},
          {"hidden_size", 2048},
          {"intermediate_size", 5632},
          {"num_hidden_layers", 24},
          {"num_attention_heads", 16},
          {"num_key_value_heads", 16},
          {"max_position_embeddings", 32768},
          {"rms_norm_eps", 1e-6},
          {"moe_intermediate_size", 1408},
          {"shared_expert_intermediate_size", 5632},
          {"num_experts_per_tok", 4},
          {"num_experts", 60},
          {"sliding_window", 4096},
          {"max_window_layers", 28},
          {"router_aux_loss_coef", 0.001}};
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  read_qwen_experts(c, s);
  s.shared_expert = {c.integer("shared_expert_intermediate_size"), true};
  s.qkv_bias = c.boolean("qkv_bias", true);
  read_sliding_window(c, s, used_window(c),
                      [first = c.integer("max_window_layers")](int64_t l) { return l < first && l % 2 == 0; });
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_moe(s);
  j["architectures"] = {"Qwen2MoeForCausalLM"};
  j["head_dim"] = s.head_dim;
  j["shared_expert_intermediate_size"] = s.shared_expert.intermediate_size;
  j["qkv_bias"] = s.qkv_bias;
  write_qwen_experts(s, j);
  write_sliding_window(s, j);
  return j;
}

// The shared expert as wide as a token's routed ones together, as in the published models.
void complete(DecoderSpec& s) {
  s.qkv_bias = true;
  s.shared_expert = {s.num_experts_per_tok * s.moe_intermediate_size, true};
}

}  // namespace

const Family& qwen2_moe_family() {
  static const Family family{"qwen2_moe", defaults(), parse, write, complete};
  return family;
}

}  // namespace moegraft::model
