// OLMoE (transformers `olmoe`): q/k norm over the full width, optional clip_qkv, softmax then top-k, every layer
// sparse.
#include "../family.h"
#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 50304},          {"hidden_size", 2048},       {"intermediate_size", 2048},
          {"num_hidden_layers", 16},      {"num_attention_heads", 16}, {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-5},         {"num_experts_per_tok", 8},  {"num_experts", 64},
          {"router_aux_loss_coef", 0.01}, {"pad_token_id", 1},         {"eos_token_id", 50279}};
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  s.num_experts = c.integer_of({"num_local_experts", "num_experts"});
  s.num_experts_per_tok = c.integer("num_experts_per_tok");
  s.moe_intermediate_size = s.intermediate_size;
  s.router.renormalise = c.boolean("norm_topk_prob", false);
  s.qk_norm = QkNorm::full;
  s.clip_qkv = c.number("clip_qkv", 0.0);
  s.qkv_bias = s.o_bias = c.boolean("attention_bias", false);
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_moe(s);
  j["architectures"] = {"OlmoeForCausalLM"};
  j["num_experts"] = s.num_experts;
  j["intermediate_size"] = s.moe_intermediate_size;
  j["norm_topk_prob"] = s.router.renormalise;
  j["clip_qkv"] = s.clip_qkv > 0 ? io::Json(s.clip_qkv) : io::Json(nullptr);
  j["attention_bias"] = s.o_bias;
  return j;
}

void complete(DecoderSpec& s) {
  s.intermediate_size = s.moe_intermediate_size;
  s.qk_norm = QkNorm::full;
  MOEGRAFT_CHECK_USAGE(s.head_dim * s.num_heads == s.hidden_size,
                       "model.init: olmoe needs num_heads * head_dim = hidden_size, got ", s.num_heads, " * ",
                       s.head_dim, " and ", s.hidden_size);
}

}  // namespace

const Family& olmoe_family() {
  static const Family family{"olmoe", defaults(), parse, write, complete};
  return family;
}

}  // namespace moegraft::model
