// OLMoE (transformers `olmoe`): q/k norm over the full width, optional clip_qkv, softmax then top-k, every layer sparse.
#include "../family.h"

namespace moegraft::model {
namespace {

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config, {.rms_norm_eps = 1e-5, .router_aux_loss_coef = 0.01, .eos_id = 50279, .pad_id = 1});
  s.num_experts = c.integer_of({"num_experts", "num_local_experts"});
  s.num_experts_per_tok = c.integer("num_experts_per_tok");
  s.moe_intermediate_size = s.intermediate_size;
  s.norm_topk_prob = c.boolean("norm_topk_prob", false);
  s.qk_norm = QkNorm::full;
  s.clip_qkv = c.number("clip_qkv", 0.0);
  s.attention_bias = c.boolean("attention_bias", false);
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_common(s);
  j["architectures"] = {"OlmoeForCausalLM"};
  j["num_experts"] = s.num_experts;
  j["intermediate_size"] = s.moe_intermediate_size;
  j["norm_topk_prob"] = s.norm_topk_prob;
  j["clip_qkv"] = s.clip_qkv > 0 ? io::Json(s.clip_qkv) : io::Json(nullptr);
  j["attention_bias"] = s.attention_bias;
  return j;
}

}  // namespace

const Family& olmoe_family() {
  static const Family family{"olmoe", parse, write, {}};
  return family;
}

}  // namespace moegraft::model
