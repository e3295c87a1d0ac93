// Qwen3 (transformers `qwen3`), dense: q/k norm per head, own head width, a sliding window in the layers from
// max_window_layers on.
#include "../family.h"

namespace moegraft::model {
namespace {

io::Json defaults() {
  return {{"vocab_size", 151936},
          {"hidden_size", 4096},
          {"intermediate_size", 22016},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 32},
          {"head_dim", 128},
          {"max_position_embeddings", 32768},
          {"rms_norm_eps", 1e-6},
          {"sliding_window", 4096},
          {"max_window_layers", 28}};
}

void complete(DecoderSpec& s) {
  make_dense(s);
  s.qk_norm = QkNorm::per_head;
}

DecoderSpec parse(const io::Json& config) {
  const ConfigReader c(config);
  DecoderSpec s = parse_common(config);
  complete(s);
  s.qkv_bias = s.o_bias = c.boolean("attention_bias", false);
  read_sliding_window(c, s, used_window(c), [first = c.integer("max_window_layers")](int64_t l) { return l >= first; });
  return s;
}

io::Json write(const DecoderSpec& s) {
  io::Json j = write_common(s);
  j["architectures"] = {"Qwen3ForCausalLM"};
  j["head_dim"] = s.head_dim;
  j["attention_bias"] = s.o_bias;
  write_sliding_window(s, j);
  return j;
}

}  // namespace

const Family& qwen3_family() {
  static const Family family{"qwen3", defaults(), parse, write, complete};
  return family;
}

}  // namespace moegraft::model
