// Qwen3-MoE (transformers `qwen3_moe`): q/k norm per head, own head width, dense layers by decoder_sparse_step and mlp_only_layers, optional sliding window.
#include <algorithm>

#include "../family.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 151936}, {"hidden_size", 2048}, {"intermediate_size", 6144}, {"num_hidden_layers", 24}, {"num_attention_heads", 32}, {"num_key_value_heads", 4},
          {"max_position_embeddings", 32768}, {"rms_norm_eps", 1e-6}, {"moe_intermediate_size", 768}, {"num_experts_per_tok", 8}, {"num_experts", 128}, {"sliding_window", 4096},
          {"router_aux_loss_coef", 0.001}};
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  s.num_experts = c.integer_of({"num_local_experts", "num_experts"});
  s.num_experts_per_tok = c.integer("num_experts_per_tok");
  s.moe_intermediate_size = c.integer("moe_intermediate_size");
  s.norm_topk_prob = c.boolean("norm_topk_prob", false);
  s.qk_norm = QkNorm::per_head;
  s.attention_bias = c.boolean("attention_bias", false);
  const int64_t step = c.integer("decoder_sparse_step", 1);
  std::vector<int64_t> dense;
  if (c.has("mlp_only_layers")) dense = c.raw("mlp_only_layers").get<std::vector<int64_t>>();
  const int64_t window = c.boolean("use_sliding_window", false) ? c.integer("sliding_window", 0) : 0;
  for (int64_t l = 0; l < s.num_layers; ++l) {
    s.layers[l].sparse = s.num_experts > 0 && step > 0 && (l + 1) % step == 0 && std::find(dense.begin(), dense.end(), l) == dense.end();
    s.layers[l].sliding_window = window;
  }
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_common(s);
  j["architectures"] = {"Qwen3MoeForCausalLM"};
  j["num_experts"] = s.num_experts;
  j["head_dim"] = s.head_dim;
  j["moe_intermediate_size"] = s.moe_intermediate_size;
  j["norm_topk_prob"] = s.norm_topk_prob;
  j["attention_bias"] = s.attention_bias;
  j["decoder_sparse_step"] = 1;
  j["mlp_only_layers"] = io::Json::array();
  for (int64_t l = 0; l < s.num_layers; ++l)
    if (!s.layers[l].sparse) j["mlp_only_layers"].push_back(l);
  const int64_t window = s.layers.empty() ? 0 : s.layers.front().sliding_window;
  j["use_sliding_window"] = window > 0;
  j["sliding_window"] = window > 0 ? io::Json(window) : io::Json(nullptr);
  return j;
}

}  // namespace

const Family& qwen3_moe_family() {
  static const Family family{"qwen3_moe", defaults(), parse, write, {}};
  return family;
}

}  // namespace moegraft::model
