#include "panels.h"

#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

template <class T>
void pack_weight(const at::Tensor& w_NK, bool backward, T* out) {
  const int64_t N = w_NK.size(0), K = w_NK.size(1);
  if (backward) pack_plain(data<T>(w_NK), w_NK.stride(0), N, K, out);
  else pack_transposed(data<T>(w_NK), w_NK.stride(0), K, N, out);
}

template <class T>
int64_t elements_of(const at::Tensor& w_NK, bool backward) {
  return backward ? Panels<T>::elements(w_NK.size(0), w_NK.size(1)) : Panels<T>::elements(w_NK.size(1), w_NK.size(0));
}

at::Tensor rows_contiguous(const at::Tensor& w) { return w.stride(1) == 1 ? w.detach() : w.detach().contiguous(); }

}  // namespace

template <class T>
Panels<T> WeightPanels::panels(Layout& layout, bool backward) {
  std::call_once(layout.once, [&] {
    layout.blob = at::empty({elements_of<T>(weight_, backward)}, at::TensorOptions(kTypeOf<T>));
    pack_weight(weight_, backward, mutable_data<T>(layout.blob));
    if (packed_) packed_();
  });
  const int64_t out = weight_.size(0), in = weight_.size(1);
  return backward ? Panels<T>{data<T>(layout.blob), out, in} : Panels<T>{data<T>(layout.blob), in, out};
}

ExpertPanels::ExpertPanels(const ExpertFfnWeights& weights, Packed packed, bool stores_backward) : packed_(std::move(packed)), stores_backward_(stores_backward) {
  const std::array<const std::vector<at::Tensor>*, 3> lists{&weights.gate_FD.list(), &weights.up_FD.list(), &weights.down_DF.list()};
  for (size_t i = 0; i < lists.size(); ++i)
    for (const auto& w : *lists[i]) weights_[i].push_back(rows_contiguous(w));
}

template <class T>
void ExpertPanels::pack(at::Tensor& blob, bool backward) {
  const int64_t experts = int64_t(weights_[0].size());
  std::array<int64_t, 4> begin{};
  for (int i = 0; i < 3; ++i) begin[i + 1] = begin[i] + elements_of<T>(weights_[i].front(), backward);
  blob = at::empty({experts, begin[3]}, at::TensorOptions(kTypeOf<T>));
  at::parallel_for(0, 3 * experts, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) pack_weight(weights_[i % 3][i / 3], backward, mutable_data<T>(blob) + i / 3 * begin[3] + begin[i % 3]);
  });
  if (packed_) packed_();
}

template <class T>
void ExpertPanels::prepare_forward() {
  std::call_once(forward_once_, [&] { pack<T>(forward_, false); });
}
template <class T>
void ExpertPanels::prepare_backward() {
  std::call_once(backward_once_, [&] { pack<T>(backward_, true); });
}

template <class T>
Panels<T> ExpertPanels::panels(const at::Tensor& blob, int64_t expert, Matrix matrix, bool backward) const {
  const T* at = data<T>(blob) + expert * blob.size(1);
  for (int i = 0; i < matrix; ++i) at += elements_of<T>(weights_[i].front(), backward);
  const at::Tensor& w = weights_[matrix].front();
  return backward ? Panels<T>{at, w.size(0), w.size(1)} : Panels<T>{at, w.size(1), w.size(0)};
}

std::shared_ptr<ExpertPanels> make_expert_panels(const ExpertFfnWeights& weights, Packed packed, bool lean) {
  if (weights.gate_FD.empty() || weights.gate_EFD.defined() || !weights.gate_FD.front().is_cpu() || !has_block_products(weights.gate_FD.front().scalar_type())) return nullptr;
  return std::make_shared<ExpertPanels>(weights, std::move(packed), !(lean && one_layout_serves(weights.gate_FD.front().scalar_type())));
}
bool one_layout_serves(at::ScalarType dtype) { return has_block_products(dtype) && (dtype == at::kFloat ? micro_kernel<float>()->turns : micro_kernel<bf16>()->turns); }
std::shared_ptr<WeightPanels> make_weight_panels(const at::Tensor& weight_NK, Packed packed) {
  if (!weight_NK.defined() || weight_NK.requires_grad() || !weight_NK.is_cpu() || !has_block_products(weight_NK.scalar_type())) return nullptr;
  return std::make_shared<WeightPanels>(rows_contiguous(weight_NK), std::move(packed));
}

#define MOEGRAFT_INSTANTIATE(T)                                                             \
  template Panels<T> WeightPanels::panels<T>(Layout&, bool);                                \
  template void ExpertPanels::prepare_forward<T>();                                         \
  template void ExpertPanels::prepare_backward<T>();                                        \
  template Panels<T> ExpertPanels::panels<T>(const at::Tensor&, int64_t, Matrix, bool) const;
MOEGRAFT_INSTANTIATE(float)
MOEGRAFT_INSTANTIATE(bf16)
#undef MOEGRAFT_INSTANTIATE

}  // namespace moegraft::kernels
