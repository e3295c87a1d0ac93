#include "resident_weights.h"

#include "libtorch.h"

namespace moegraft::model {
namespace {

// Once, not in every step. A GPU's kernels read norms as they lie.
void widen(ResidentWeights& w) {
  if (w.type != at::kBFloat16) return;
  const auto to_float = [](at::Tensor& t) { t = t.defined() ? t.to(at::kFloat) : t; };
  for (LayerWeights& layer : w.layers) to_float(layer.router_ED);
  if (!w.where.is_cpu()) return;
  to_float(w.final_norm);
  for (LayerWeights& layer : w.layers) to_float(layer.input_norm_D), to_float(layer.post_norm_D);
}

// Once laid out as panels, a mapped weight is hardly read again: its pages go back to the kernel's cache.
void make_panels(ResidentWeights& w, const std::shared_ptr<const TensorSource>& source, bool lean) {
  const auto release = [&](std::vector<at::Tensor> tensors) -> kernels::Packed {
    if (!source || tensors.empty() || !source->holds(tensors.front())) return nullptr;
    return [source, tensors = std::move(tensors)] {
      for (const auto& t : tensors) source->release(t);
    };
  };
  const auto matrix = [&](const at::Tensor& t) { return t.defined() ? kernels::make_weight_panels(t, release({t})) : nullptr; };
  w.panels_of_head = matrix(w.head);
  for (auto& layer : w.layers) {
    auto& a = layer.attention;
    a.q_panels = matrix(a.q), a.k_panels = matrix(a.k), a.v_panels = matrix(a.v), a.o_panels = matrix(a.o);
    auto& d = layer.dense;
    d.gate_panels = matrix(d.gate_ID), d.up_panels = matrix(d.up_ID), d.down_panels = matrix(d.down_DI);
  }
  for (auto& x : w.layer_experts) {
    std::vector<at::Tensor> all = x.gate_FD.list();
    for (const auto* list : {&x.up_FD, &x.down_DF}) all.insert(all.end(), list->begin(), list->end());
    x.panels = kernels::make_expert_panels({x.gate_FD, x.up_FD, x.down_DF, {}, {}, {}, {}}, release(std::move(all)), lean);
  }
}

}  // namespace

void finish_frozen(ResidentWeights& weights, bool lean, const std::shared_ptr<const TensorSource>& source) {
  widen(weights);
  make_panels(weights, source, lean);
}

}  // namespace moegraft::model
