#pragma once
// Rows of a family's table and the tensors in memory that they stand for.

#include <memory>

#include "family.h"
#include "moegraft/model/weights.h"
#include "resident_weights.h"

namespace moegraft::model {

// Where a tensor of a layer or of the whole model goes: a matrix of the model's format, or a tensor of its own. Null:
// the role has the other kind.
struct Slot {
  kernels::Matrix* matrix = nullptr;
  at::Tensor* tensor = nullptr;
  void set(at::Tensor t) const {
    if (matrix)
      *matrix = kernels::Matrix(std::move(t));
    else
      *tensor = std::move(t);
  }
  const at::Tensor& get() const { return matrix ? matrix->tensor() : *tensor; }
};
// Of a tensor of scope layer, of scope model, and of an expert's in all of a layer. Dense and shared FFNs lie in the
// same: a layer has one of them.
Slot slot(LayerWeights& weights, TensorRole role);
Slot slot(ResidentWeights& weights, TensorRole role);
kernels::ExpertMatrices& matrices(ExpertWeights& weights, TensorRole role);
at::Tensor& stacked(ExpertWeights& weights, TensorRole role);

// Calls f(row) for the tensors of one scope that a layer of this kind has, in the table's order.
template <class F>
void for_each_row(const DecoderSpec& spec, TensorScope scope, const LayerSpec& kind, const F& f) {
  for (const TensorRow& row : find_family(spec.family).tensors)
    if (row.scope == scope && row.present(spec, kind)) f(row);
}

// Weights in memory: make(row) gives each tensor of model and layers, make_experts() those of a sparse layer.
template <class Make, class MakeExperts>
std::shared_ptr<ResidentWeights> make_weights(const DecoderSpec& spec, const Make& make,
                                              const MakeExperts& make_experts) {
  auto w = std::make_shared<ResidentWeights>();
  for_each_row(spec, TensorScope::model, {}, [&](const TensorRow& row) { slot(*w, row.role).set(make(row)); });
  if (!w->head.defined()) w->head = w->embedding;
  for (const LayerSpec& kind : spec.layers) {
    LayerWeights layer;
    for_each_row(spec, TensorScope::layer, kind, [&](const TensorRow& row) { slot(layer, row.role).set(make(row)); });
    w->layers.push_back(std::move(layer));
    w->layer_experts.push_back(kind.sparse ? make_experts() : ExpertWeights{});
  }
  return w;
}

}  // namespace moegraft::model
