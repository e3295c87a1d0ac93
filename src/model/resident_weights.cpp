#include "resident_weights.h"

#include "libtorch.h"

#include <mutex>

#include "moegraft/base/log.h"

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

kernels::OnPacked release(const std::shared_ptr<const TensorSource>& source, std::vector<at::Tensor> tensors) {
  if (!source || tensors.empty() || !source->holds(tensors.front())) return nullptr;
  return [source, tensors = std::move(tensors)] {
    for (const auto& t : tensors) source->release(t);
  };
}

std::vector<at::Tensor> matrices_of(const ExpertWeights& x) {
  std::vector<at::Tensor> all = x.gate_FD.list();
  for (const auto* list : {&x.up_FD, &x.down_DF}) all.insert(all.end(), list->begin(), list->end());
  return all;
}

// f(matrix, what it is) for every matrix of the model's format but the embedding, the head and the experts'.
template <class F>
void for_each_matrix(ResidentWeights& w, const F& f) {
  for (size_t l = 0; l < w.layers.size(); ++l) {
    auto& a = w.layers[l].attention;
    auto& d = w.layers[l].dense;
    for (const auto& [matrix, name] : {std::pair{&a.q, "q"},
                                       {&a.k, "k"},
                                       {&a.v, "v"},
                                       {&a.o, "o"},
                                       {&d.gate_ID, "gate"},
                                       {&d.up_ID, "up"},
                                       {&d.down_DI, "down"}})
      if (matrix->defined()) f(*matrix, detail::concat("layer ", l, ", ", name));
  }
}

// Once laid out as panels, a mapped weight is hardly read again: its pages go back to the kernel's cache.
void make_panels(ResidentWeights& w, const std::shared_ptr<const TensorSource>& source, bool lean) {
  const auto pack = [&](kernels::Matrix& m, const std::string& = "") {
    m = kernels::pack_weight(m, release(source, {m.tensor()}));
  };
  pack(w.head);
  for_each_matrix(w, pack);
  for (auto& x : w.layer_experts)
    x.panels = kernels::make_expert_panels(x.as_ffn(), release(source, matrices_of(x)), lean);
}

void quantise_all(ResidentWeights& w, const std::shared_ptr<const TensorSource>& source, kernels::WeightFormat format) {
  // Where the format's values are to be floats (no micro-kernels), they are the model's.
  const auto in_dtype = [&](const kernels::Matrix& m) { return m.quantised() ? m : kernels::Matrix(m.dense(w.type)); };
  const auto at_place = [](const std::string& what, const auto& f) {
    try {
      f();
    } catch (const UserError& e) { fail<UserError>(what, ": ", e.what()); }
  };
  const auto one = [&](kernels::Matrix& m, const std::string& what) {
    const at::Tensor from = m.tensor();
    at_place(what, [&] { m = in_dtype(kernels::quantise(from, format)); });
    if (const auto done = release(source, {from})) done();
  };
  const bool tied = w.head.tensor().is_same(w.embedding.tensor());
  one(w.embedding, "embedding");
  if (tied)
    w.head = w.embedding;
  else
    one(w.head, "head");
  for_each_matrix(w, one);
  for (size_t l = 0; l < w.layer_experts.size(); ++l) {
    ExpertWeights& x = w.layer_experts[l];
    if (x.gate_FD.empty()) continue;
    const auto done = release(source, matrices_of(x));
    kernels::ExpertFfnWeights ffn = x.as_ffn();
    at_place(detail::concat("layer ", l, ", experts"), [&] { kernels::quantise_experts(ffn, format); });
    for (auto* list : {&ffn.gate_FD, &ffn.up_FD, &ffn.down_DF})
      for (at::Tensor& t : list->own()) t = t.to(w.type);
    x.gate_FD = ffn.gate_FD, x.up_FD = ffn.up_FD, x.down_DF = ffn.down_DF, x.panels = ffn.panels;
    if (done) done();
  }
}

}  // namespace

void check_format(kernels::WeightFormat format, at::Device device) {
  const kernels::WeightFormatRow& row = kernels::format_row(format);
  MOEGRAFT_CHECK_USAGE(device.is_cpu() || row.on_gpu, "model.quantize: ", row.name, " has no path on a GPU (",
                       device.str(), "); use model.device: cpu, or model.quantize: none");
  static std::once_flag once;
  if (!kernels::quantised_products())
    std::call_once(once, [&] {
      log::warning("model.quantize: ", row.name,
                   ": this CPU path has no products of quantised weights; they take its values in floats, which saves "
                   "no memory");
    });
}

void finish_frozen(ResidentWeights& weights, bool lean, const std::shared_ptr<const TensorSource>& source,
                   std::optional<kernels::WeightFormat> quantise) {
  const at::NoGradGuard no_grad;
  widen(weights);
  if (quantise)
    quantise_all(weights, source, *quantise);
  else
    make_panels(weights, source, lean);
}

}  // namespace moegraft::model
