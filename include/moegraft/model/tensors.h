#pragma once
// Which tensors a base has: one row each in a family's table, which loading, initialisation, saving, registration,
// counts and plans all walk.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "moegraft/model/spec.h"

namespace moegraft::model {

enum class TensorRole {
  embedding,
  head,
  final_norm,
  input_norm,
  post_norm,
  q,
  k,
  v,
  o,
  q_bias,
  k_bias,
  v_bias,
  o_bias,
  q_norm,
  k_norm,
  dense_gate,
  dense_up,
  dense_down,
  dense_gate_bias,
  dense_up_bias,
  dense_down_bias,
  router,
  router_correction,
  expert_gate,
  expert_up,
  expert_down,
  shared_gate,
  shared_up,
  shared_down,
  shared_scale,
};

enum class TensorScope { model, layer, expert };

// What a tensor starts from in a base trained from scratch. residual: what adds to the residual stream, scaled down
// with depth.
enum class TensorInit { embedding, linear, residual, ones, zeros };

using Shape = std::vector<int64_t>;

struct TensorRow {
  TensorRole role;
  TensorScope scope;
  std::string name;                                // in files; {l} stands for the layer, {e} for the expert
  std::function<Shape(const DecoderSpec&)> shape;  // matrices [out, in]
  std::function<bool(const DecoderSpec&, const LayerSpec&)> present;  // in a layer of this kind
  TensorInit init;
};
using TensorTable = std::vector<TensorRow>;

// Every tensor under the names that most families use (transformers' Llama, Qwen and OLMoE classes), in the order in
// which files hold them.
TensorTable decoder_tensors();
TensorRow& row_of(TensorTable& table, TensorRole role);
const TensorRow& row_of(const TensorTable& table, TensorRole role);

// "model.layers.{l}.mlp.experts.{e}.gate_proj.weight" with its numbers.
std::string tensor_name(const std::string& pattern, int64_t layer, int64_t expert = 0);

// A tensor of one model; a layer's experts are one entry.
struct TensorShape {
  TensorRole role;
  int64_t layer = -1;     // -1: of the whole model
  Shape shape;            // of one expert
  int64_t count = 1;      // experts
  int64_t numel() const;  // of all
};
// In the table's order, layer by layer.
std::vector<TensorShape> tensor_shapes(const DecoderSpec& spec);

// Matrices that a product reads as a whole: the head, attention's, dense and shared FFNs'. Neither experts nor routers,
// which have layouts of their own.
bool is_linear_layer(TensorRole role);

}  // namespace moegraft::model
