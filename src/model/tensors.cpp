// The table of a decoder's tensors, and counts from it.
#include "moegraft/model/tensors.h"

#include <algorithm>

#include "family.h"
#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

using Role = TensorRole;
using Scope = TensorScope;
using Init = TensorInit;

int64_t q_width(const DecoderSpec& s) { return s.num_heads * s.head_dim; }
int64_t kv_width(const DecoderSpec& s) { return s.num_kv_heads * s.head_dim; }

Shape width(const DecoderSpec& s) { return {s.hidden_size}; }
Shape vocabulary(const DecoderSpec& s) { return {s.vocab_size, s.hidden_size}; }
Shape q_norm(const DecoderSpec& s) { return {s.qk_norm == QkNorm::full ? q_width(s) : s.head_dim}; }
Shape k_norm(const DecoderSpec& s) { return {s.qk_norm == QkNorm::full ? kv_width(s) : s.head_dim}; }

bool always(const DecoderSpec&, const LayerSpec&) { return true; }
bool dense(const DecoderSpec&, const LayerSpec& layer) { return !layer.sparse; }
bool dense_bias(const DecoderSpec& s, const LayerSpec& layer) { return s.mlp_bias && !layer.sparse; }
bool sparse(const DecoderSpec&, const LayerSpec& layer) { return layer.sparse; }
bool shared(const DecoderSpec& s, const LayerSpec& layer) {
  return layer.sparse && s.shared_expert.intermediate_size > 0;
}
bool qkv_bias(const DecoderSpec& s, const LayerSpec&) { return s.qkv_bias; }
bool normed(const DecoderSpec& s, const LayerSpec&) { return s.qk_norm != QkNorm::none; }

}  // namespace

TensorTable decoder_tensors() {
  const std::string layer = "model.layers.{l}.", attention = layer + "self_attn.", mlp = layer + "mlp.",
                    expert = mlp + "experts.{e}.", shared_expert = mlp + "shared_expert.";
  using S = DecoderSpec;
  return {
      {Role::embedding, Scope::model, "model.embed_tokens.weight", vocabulary, always, Init::embedding},
      {Role::head, Scope::model, "lm_head.weight", vocabulary,
       [](const S& s, const LayerSpec&) { return !s.tie_word_embeddings; }, Init::linear},
      {Role::final_norm, Scope::model, "model.norm.weight", width, always, Init::ones},

      {Role::input_norm, Scope::layer, layer + "input_layernorm.weight", width, always, Init::ones},
      {Role::post_norm, Scope::layer, layer + "post_attention_layernorm.weight", width, always, Init::ones},
      {Role::q, Scope::layer, attention + "q_proj.weight", [](const S& s) { return Shape{q_width(s), s.hidden_size}; },
       always, Init::linear},
      {Role::k, Scope::layer, attention + "k_proj.weight", [](const S& s) { return Shape{kv_width(s), s.hidden_size}; },
       always, Init::linear},
      {Role::v, Scope::layer, attention + "v_proj.weight", [](const S& s) { return Shape{kv_width(s), s.hidden_size}; },
       always, Init::linear},
      {Role::o, Scope::layer, attention + "o_proj.weight", [](const S& s) { return Shape{s.hidden_size, q_width(s)}; },
       always, Init::residual},
      {Role::q_bias, Scope::layer, attention + "q_proj.bias", [](const S& s) { return Shape{q_width(s)}; }, qkv_bias,
       Init::zeros},
      {Role::k_bias, Scope::layer, attention + "k_proj.bias", [](const S& s) { return Shape{kv_width(s)}; }, qkv_bias,
       Init::zeros},
      {Role::v_bias, Scope::layer, attention + "v_proj.bias", [](const S& s) { return Shape{kv_width(s)}; }, qkv_bias,
       Init::zeros},
      {Role::o_bias, Scope::layer, attention + "o_proj.bias", width,
       [](const S& s, const LayerSpec&) { return s.o_bias; }, Init::zeros},
      {Role::q_norm, Scope::layer, attention + "q_norm.weight", q_norm, normed, Init::ones},
      {Role::k_norm, Scope::layer, attention + "k_norm.weight", k_norm, normed, Init::ones},

      {Role::dense_gate, Scope::layer, mlp + "gate_proj.weight",
       [](const S& s) { return Shape{s.intermediate_size, s.hidden_size}; }, dense, Init::linear},
      {Role::dense_up, Scope::layer, mlp + "up_proj.weight",
       [](const S& s) { return Shape{s.intermediate_size, s.hidden_size}; }, dense, Init::linear},
      {Role::dense_down, Scope::layer, mlp + "down_proj.weight",
       [](const S& s) { return Shape{s.hidden_size, s.intermediate_size}; }, dense, Init::residual},
      {Role::dense_gate_bias, Scope::layer, mlp + "gate_proj.bias",
       [](const S& s) { return Shape{s.intermediate_size}; }, dense_bias, Init::zeros},
      {Role::dense_up_bias, Scope::layer, mlp + "up_proj.bias", [](const S& s) { return Shape{s.intermediate_size}; },
       dense_bias, Init::zeros},
      {Role::dense_down_bias, Scope::layer, mlp + "down_proj.bias", width, dense_bias, Init::zeros},

      {Role::router, Scope::layer, mlp + "gate.weight", [](const S& s) { return Shape{s.num_experts, s.hidden_size}; },
       sparse, Init::linear},
      {Role::router_correction, Scope::layer, mlp + "gate.e_score_correction_bias",
       [](const S& s) { return Shape{s.num_experts}; },
       [](const S& s, const LayerSpec& l) { return l.sparse && s.router.correction_bias; }, Init::zeros},
      {Role::expert_gate, Scope::expert, expert + "gate_proj.weight",
       [](const S& s) { return Shape{s.moe_intermediate_size, s.hidden_size}; }, sparse, Init::linear},
      {Role::expert_up, Scope::expert, expert + "up_proj.weight",
       [](const S& s) { return Shape{s.moe_intermediate_size, s.hidden_size}; }, sparse, Init::linear},
      {Role::expert_down, Scope::expert, expert + "down_proj.weight",
       [](const S& s) { return Shape{s.hidden_size, s.moe_intermediate_size}; }, sparse, Init::residual},
      {Role::shared_gate, Scope::layer, shared_expert + "gate_proj.weight",
       [](const S& s) { return Shape{s.shared_expert.intermediate_size, s.hidden_size}; }, shared, Init::linear},
      {Role::shared_up, Scope::layer, shared_expert + "up_proj.weight",
       [](const S& s) { return Shape{s.shared_expert.intermediate_size, s.hidden_size}; }, shared, Init::linear},
      {Role::shared_down, Scope::layer, shared_expert + "down_proj.weight",
       [](const S& s) { return Shape{s.hidden_size, s.shared_expert.intermediate_size}; }, shared, Init::residual},
      {Role::shared_scale, Scope::layer, mlp + "shared_expert_gate.weight",
       [](const S& s) { return Shape{1, s.hidden_size}; },
       [](const S& s, const LayerSpec& l) { return shared(s, l) && s.shared_expert.gated; }, Init::linear},
  };
}

const TensorRow& row_of(const TensorTable& table, Role role) {
  const auto found = std::find_if(table.begin(), table.end(), [&](const TensorRow& row) { return row.role == role; });
  MOEGRAFT_INVARIANT(found != table.end(), "no row of a table of tensors has role ", int(role));
  return *found;
}
TensorRow& row_of(TensorTable& table, Role role) { return const_cast<TensorRow&>(row_of(std::as_const(table), role)); }

std::string tensor_name(const std::string& pattern, int64_t layer, int64_t expert) {
  std::string out = pattern;
  const auto replace = [&](const char* key, int64_t value) {
    if (const size_t at = out.find(key); at != std::string::npos) out.replace(at, 3, std::to_string(value));
  };
  replace("{l}", layer);
  replace("{e}", expert);
  return out;
}

int64_t TensorShape::numel() const {
  int64_t n = count;
  for (const int64_t size : shape) n *= size;
  return n;
}

std::vector<TensorShape> tensor_shapes(const DecoderSpec& s) {
  const TensorTable& table = find_family(s.family).tensors;
  std::vector<TensorShape> all;
  const auto add = [&](int64_t layer, const LayerSpec& kind, bool of_model) {
    for (const TensorRow& row : table)
      if ((row.scope == Scope::model) == of_model && row.present(s, kind))
        all.push_back({row.role, layer, row.shape(s), row.scope == Scope::expert ? s.num_experts : 1});
  };
  add(-1, {}, true);
  for (size_t l = 0; l < s.layers.size(); ++l) add(int64_t(l), s.layers[l], false);
  return all;
}

bool is_linear_layer(Role role) {
  switch (role) {
    case Role::head:
    case Role::q:
    case Role::k:
    case Role::v:
    case Role::o:
    case Role::dense_gate:
    case Role::dense_up:
    case Role::dense_down:
    case Role::shared_gate:
    case Role::shared_up:
    case Role::shared_down: return true;
    default: return false;
  }
}

bool DecoderSpec::has_experts() const {
  return std::any_of(layers.begin(), layers.end(), [](const LayerSpec& layer) { return layer.sparse; });
}

int64_t DecoderSpec::num_parameters() const {
  int64_t total = 0;
  for (const TensorShape& t : tensor_shapes(*this)) total += t.numel();
  return total;
}

int64_t DecoderSpec::num_active_parameters() const {
  int64_t total = 0;
  for (const TensorShape& t : tensor_shapes(*this))
    total += t.count > 1 ? t.numel() / t.count * num_experts_per_tok : t.numel();
  return total;
}

}  // namespace moegraft::model
