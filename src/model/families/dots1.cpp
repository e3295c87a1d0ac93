// dots.llm1 (transformers `dots1`): DeepSeek-V3's router (sigmoid scores, a correction bias for the choice, groups, a
// scale) over plain attention with q/k norm per head, a shared expert without a gate, dense layers first, a sliding
// window in the layers from max_window_layers on.
#include <algorithm>

#include "../family.h"
#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 152064},
          {"hidden_size", 4608},
          {"intermediate_size", 10944},
          {"num_hidden_layers", 62},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 32},
          {"max_position_embeddings", 2048},
          {"rms_norm_eps", 1e-6},
          {"moe_intermediate_size", 1408},
          {"sliding_window", 4096},
          {"max_window_layers", 62}};
}

void complete(DecoderSpec& s) {
  s.qk_norm = QkNorm::per_head;
  s.router.score = RouterSpec::Score::sigmoid;
  s.router.correction_bias = true;
  s.shared_expert = {s.moe_intermediate_size, false};
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  s.num_experts = c.integer_of({"n_routed_experts", "num_local_experts"});
  s.num_experts_per_tok = c.integer("num_experts_per_tok");
  s.moe_intermediate_size = c.integer("moe_intermediate_size");
  complete(s);
  const int64_t shared = c.integer("n_shared_experts");
  MOEGRAFT_CHECK(shared > 0 && shared <= 1024, "config.json: n_shared_experts must be positive, got ", shared);
  s.shared_expert.intermediate_size = shared * s.moe_intermediate_size;
  s.router.num_groups = c.integer("n_group", 1), s.router.topk_groups = c.integer("topk_group", 1);
  s.router.renormalise = c.boolean("norm_topk_prob", false);
  s.router.scale = c.number("routed_scaling_factor", 1.0);
  s.qkv_bias = s.o_bias = c.boolean("attention_bias", false);
  const int64_t dense = c.integer("first_k_dense_replace", 0);
  for (int64_t l = 0; l < s.num_layers; ++l) s.layers[l].sparse = l >= dense;
  read_sliding_window(c, s, c.integer("sliding_window", 0),
                      [first = c.integer("max_window_layers")](int64_t l) { return l >= first; });
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_moe(s);
  j["architectures"] = {"Dots1ForCausalLM"};
  j["n_routed_experts"] = s.num_experts;
  j["n_shared_experts"] = s.shared_expert.intermediate_size / s.moe_intermediate_size;
  j["n_group"] = s.router.num_groups, j["topk_group"] = s.router.topk_groups;
  j["norm_topk_prob"] = s.router.renormalise;
  j["routed_scaling_factor"] = s.router.scale;
  j["head_dim"] = s.head_dim;
  j["moe_intermediate_size"] = s.moe_intermediate_size;
  j["attention_bias"] = s.o_bias;
  const auto sparse =
      std::find_if(s.layers.begin(), s.layers.end(), [](const LayerSpec& layer) { return layer.sparse; });
  j["first_k_dense_replace"] = sparse - s.layers.begin();
  MOEGRAFT_CHECK(std::all_of(sparse, s.layers.end(), [](const LayerSpec& layer) { return layer.sparse; }),
                 "dots1 has its dense layers first");
  write_sliding_window(s, j);
  j.erase("use_sliding_window");
  return j;
}

TensorTable tensors() {
  TensorTable t = decoder_tensors();
  const std::string shared = "model.layers.{l}.mlp.shared_experts.";
  row_of(t, TensorRole::shared_gate).name = shared + "gate_proj.weight";
  row_of(t, TensorRole::shared_up).name = shared + "up_proj.weight";
  row_of(t, TensorRole::shared_down).name = shared + "down_proj.weight";
  return t;
}

}  // namespace

const Family& dots1_family() {
  static const Family family{"dots1", defaults(), parse, write, complete, tensors()};
  return family;
}

}  // namespace moegraft::model
