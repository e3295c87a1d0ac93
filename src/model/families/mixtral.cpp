// Mixtral (transformers `mixtral`): top-k weights always renormalised, w1 gate, w3 up, w2 down, optional sliding window
// and head_dim.
#include "../family.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 32000},
          {"hidden_size", 4096},
          {"intermediate_size", 14336},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 8},
          {"max_position_embeddings", 131072},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 1e6},
          {"num_experts_per_tok", 2},
          {"num_local_experts", 8},
          {"router_aux_loss_coef", 0.001},
          {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  s.num_experts = c.integer_of({"num_experts", "num_local_experts"});
  s.num_experts_per_tok = c.integer("num_experts_per_tok");
  s.moe_intermediate_size = s.intermediate_size;
  s.router.renormalise = true;
  for (auto& layer : s.layers) layer.sliding_window = c.integer("sliding_window", 0);
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_moe(s);
  j["architectures"] = {"MixtralForCausalLM"};
  j["num_local_experts"] = s.num_experts;
  j["head_dim"] = s.head_dim;
  j["intermediate_size"] = s.moe_intermediate_size;
  const int64_t window = s.layers.empty() ? 0 : s.layers.front().sliding_window;
  j["sliding_window"] = window > 0 ? io::Json(window) : io::Json(nullptr);
  j["router_jitter_noise"] = 0.0;
  return j;
}

void complete(DecoderSpec& s) { s.intermediate_size = s.moe_intermediate_size; }

TensorTable tensors() {
  TensorTable t = decoder_tensors();
  const std::string block = "model.layers.{l}.block_sparse_moe.";
  row_of(t, TensorRole::router).name = block + "gate.weight";
  row_of(t, TensorRole::expert_gate).name = block + "experts.{e}.w1.weight";
  row_of(t, TensorRole::expert_up).name = block + "experts.{e}.w3.weight";
  row_of(t, TensorRole::expert_down).name = block + "experts.{e}.w2.weight";
  return t;
}

}  // namespace

const Family& mixtral_family() {
  static const Family family{"mixtral",
                             defaults(),
                             parse,
                             write,
                             complete,
                             tensors(),
                             "model.layers.{l}.block_sparse_moe.experts.gate_up_proj",
                             "model.layers.{l}.block_sparse_moe.experts.down_proj"};
  return family;
}

}  // namespace moegraft::model
