#pragma once
// What a decoder is, for every family. A family file fills this from config.json; the decoder reads nothing else.
// Letters: T tokens, D model width, H query heads, G KV heads, C head width, F expert width, I dense FFN width, E
// experts, K experts per token, V vocabulary.

#include <cstdint>
#include <string>
#include <vector>

namespace moegraft::model {

enum class QkNorm { none, per_head, full };  // per_head: over C (Qwen3); full: over H*C and G*C (OLMoE)

// From a router's logits to experts and weights: scores of all experts, the K best of them, their scores as weights.
// softmax over the experts (Shazeer et al., arXiv:1701.06538), or each expert's sigmoid (DeepSeek-V3,
// arXiv:2412.19437).
struct RouterSpec {
  enum class Score { softmax, sigmoid };
  Score score = Score::softmax;
  bool correction_bias = false;             // a vector [E] added to the scores for the choice, not for the weights
  int64_t num_groups = 1, topk_groups = 1;  // experts lie in equal groups; only those of the best topk_groups (by the
                                            // sum of a group's two best) may be chosen
  bool renormalise = false;                 // a token's weights are divided by their sum
  double scale = 1.0;                       // times this, at last
  // Softmax and top k, for which there are kernels.
  bool is_plain() const { return score == Score::softmax && !correction_bias && num_groups == 1 && scale == 1.0; }
};

enum class Activation { silu };  // of gated FFNs: down(act(gate(x)) * up(x))

// An expert beside the routed ones that every token visits: its output is added to theirs.
struct SharedExpertSpec {
  int64_t intermediate_size = 0;  // 0: none
  bool gated = false;             // times sigmoid(x . w), one number per token (Qwen2-MoE)
};

struct RopeSpec {
  double theta = 10000.0;
  std::string type =
      "default";  // default | linear | dynamic | yarn | llama3 …; families refuse what the decoder does not know
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;              // llama3
  double beta_fast = 32.0, beta_slow = 1.0, attention_factor = 0.0;  // yarn; attention_factor 0: computed
  double mscale = 0.0, mscale_all_dim = 0.0;
  bool truncate = true;
  int64_t original_max_positions = 0;
  double partial_factor = 1.0;  // share of a head that is rotated
};

struct LayerSpec {
  bool sparse = true;          // MoE or dense FFN
  int64_t sliding_window = 0;  // 0: full attention; w: a query sees keys j with i - w < j <= i
};

struct DecoderSpec {
  std::string family;  // transformers model_type, one of known_families()
  int64_t vocab_size = 0, hidden_size = 0, num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t intermediate_size = 0;      // I, dense layers
  int64_t moe_intermediate_size = 0;  // F
  int64_t num_experts = 0, num_experts_per_tok = 0;
  RouterSpec router;
  SharedExpertSpec shared_expert;  // of every sparse layer
  Activation activation = Activation::silu;
  double rms_norm_eps = 1e-6;
  QkNorm qk_norm = QkNorm::none;
  double clip_qkv = 0.0;                  // 0: off
  bool qkv_bias = false, o_bias = false;  // of attention's projections
  bool mlp_bias = false;                  // of dense layers' gate, up and down
  bool tie_word_embeddings = false;
  RopeSpec rope;
  std::vector<LayerSpec> layers;
  int64_t max_positions = 0;
  int64_t bos_id = -1, eos_id = -1, pad_id = -1;
  double router_aux_loss_coef = 0.0;
  double initializer_range = 0.02;

  bool has_experts() const;               // any layer is sparse; a dense model has none
  int64_t num_parameters() const;         // all base parameters
  int64_t num_active_parameters() const;  // used per token (K experts), embedding and head included
};

}  // namespace moegraft::model
