#include "panels.h"

#include <exception>

#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

template <class T>
void pack_dense(const at::Tensor& w_NK, bool backward, T* out) {
  const int64_t N = w_NK.size(0), K = w_NK.size(1);
  if (backward)
    pack_plain(data<T>(w_NK), w_NK.stride(0), N, K, out);
  else
    pack_transposed(data<T>(w_NK), w_NK.stride(0), K, N, out);
}

template <class T>
int64_t elements_of(std::pair<int64_t, int64_t> shape, bool backward) {
  return backward ? Panels<T>::elements(shape.first, shape.second) : Panels<T>::elements(shape.second, shape.first);
}

at::Tensor rows_contiguous(const at::Tensor& w) { return w.stride(1) == 1 ? w.detach() : w.detach().contiguous(); }

int64_t bytes_of(std::pair<int64_t, int64_t> shape, const BlockFormat& format) {
  return format.groups(shape.second) * format.group_bytes(padded_width(shape.first));
}

// Panel j of W [N, K] in blocks; out is zero.
void quantise_panel(const at::Tensor& w_NK, const BlockFormat& format, int64_t j, uint8_t* out) {
  const int64_t K = w_NK.size(1), block = format.row().block, rows = std::min(kPanel, w_NK.size(0) - j * kPanel),
                width = padded_width(rows);
  const at::Tensor slab = w_NK.narrow(0, j * kPanel, rows).to(at::kFloat).contiguous();
  std::vector<float> one(size_t(block), 0.0f);
  for (int64_t g = 0; g < format.groups(K); ++g)
    for (int64_t r = 0; r < rows; ++r) {
      const float* in = slab.const_data_ptr<float>() + r * K + g * block;
      const int64_t here = std::min(block, K - g * block);
      std::fill(std::copy_n(in, here, one.begin()), one.end(), 0.0f);
      MOEGRAFT_CHECK(format.store(one.data(), r, width, out + g * format.group_bytes(width)), format.row().name,
                     ": row ", j * kPanel + r, ", columns ", g * block, " to ", g * block + here - 1,
                     " are not finite or too large for its scale");
    }
}
int64_t count_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
uint8_t* panel_at(const at::Tensor& blocks, const BlockFormat& format, int64_t columns, int64_t j) {
  return blocks.mutable_data_ptr<uint8_t>() + j * format.groups(columns) * format.group_bytes(kPanel);
}

// f(i) for i in [0, count) on all threads; the first exception comes out here.
template <class F>
void in_parallel(int64_t count, const F& f) {
  std::exception_ptr failed;
  std::mutex mutex;
  at::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
    const at::NoGradGuard no_grad;
    try {
      for (int64_t i = from; i < to; ++i) f(i);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failed) failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

}  // namespace

WeightPanels::WeightPanels(at::Tensor weight_NK, OnPacked on_packed)
    : rows_(weight_NK.size(0)),
      columns_(weight_NK.size(1)),
      weight_(std::move(weight_NK)),
      on_packed_(std::move(on_packed)) {}

WeightPanels::WeightPanels(const at::Tensor& w_NK, const BlockFormat& format)
    : rows_(w_NK.size(0)), columns_(w_NK.size(1)), format_(&format) {
  blocks_ = at::zeros({bytes_of({rows_, columns_}, format)}, at::kByte);
  in_parallel(count_panels(rows_),
              [&](int64_t j) { quantise_panel(w_NK, format, j, panel_at(blocks_, format, columns_, j)); });
}

template <class T>
Panels<T> WeightPanels::panels(Layout& layout, bool backward) {
  Panels<T> p{nullptr, backward ? rows_ : columns_, backward ? columns_ : rows_};
  if (format_) {
    p.stored = {blocks_.const_data_ptr(), format_, columns_, rows_, backward};
    return p;
  }
  std::call_once(layout.once, [&] {
    layout.blob = at::empty({elements_of<T>({rows_, columns_}, backward)}, at::TensorOptions(kTypeOf<T>));
    pack_dense(weight_, backward, mutable_data<T>(layout.blob));
    if (on_packed_) on_packed_();
  });
  p.data = data<T>(layout.blob);
  return p;
}

at::Tensor WeightPanels::dense() const {
  const at::Tensor out = at::empty({rows_, columns_}, at::kFloat);
  in_parallel(count_panels(rows_), [&](int64_t j) {
    const int64_t count = std::min(kPanel, rows_ - j * kPanel), width = padded_width(count);
    const at::Tensor panel = at::empty({columns_, width}, at::kFloat);
    format_->dequantise(panel_at(blocks_, *format_, columns_, j), width, 0, columns_, panel.mutable_data_ptr<float>());
    out.narrow(0, j * kPanel, count).copy_(panel.narrow(1, 0, count).t());
  });
  return out;
}

at::Tensor WeightPanels::dense_rows(const at::Tensor& ids) const {
  const at::Tensor flat = ids.reshape({-1}).to(at::kLong).contiguous(),
                   out = at::empty({flat.size(0), columns_}, at::kFloat);
  const int64_t block = format_->row().block;
  in_parallel(flat.size(0), [&](int64_t i) {
    const int64_t row = flat.const_data_ptr<int64_t>()[i], j = row / kPanel,
                  width = padded_width(std::min(kPanel, rows_ - j * kPanel));
    MOEGRAFT_INVARIANT(row >= 0 && row < rows_, "embedding: id ", row, " of ", rows_);
    const uint8_t* panel = panel_at(blocks_, *format_, columns_, j);
    float* to = out.mutable_data_ptr<float>() + i * columns_;
    std::vector<float> one(static_cast<size_t>(block));
    for (int64_t k = 0; k < columns_; k += block) {
      format_->load(panel + k / block * format_->group_bytes(width), row % kPanel, width, one.data());
      std::copy_n(one.begin(), std::min(block, columns_ - k), to + k);
    }
  });
  return out;
}

ExpertPanels::ExpertPanels(const ExpertFfnWeights& weights) : experts_(int64_t(weights.gate_FD.size())) {
  const std::array<const std::vector<at::Tensor>*, 3> lists{&weights.gate_FD.list(), &weights.up_FD.list(),
                                                            &weights.down_DF.list()};
  for (size_t i = 0; i < lists.size(); ++i) {
    shapes_[i] = {lists[i]->front().size(0), lists[i]->front().size(1)};
    for (const auto& w : *lists[i]) weights_[i].push_back(rows_contiguous(w));
  }
}

ExpertPanels::ExpertPanels(const ExpertFfnWeights& weights, OnPacked on_packed, bool stores_backward)
    : ExpertPanels(weights) {
  on_packed_ = std::move(on_packed);
  stores_backward_ = stores_backward;
}

ExpertPanels::ExpertPanels(const ExpertFfnWeights& weights, const BlockFormat& format) : ExpertPanels(weights) {
  format_ = &format;
  std::array<int64_t, 4> begin{};
  for (size_t i = 0; i < 3; ++i) begin[i + 1] = begin[i] + bytes_of(shapes_[i], format);
  forward_ = at::zeros({experts_, begin[3]}, at::kByte);
  in_parallel(3 * experts_, [&](int64_t i) {
    const auto matrix = size_t(i % 3);
    const at::Tensor blocks = forward_[i / 3].narrow(0, begin[matrix], bytes_of(shapes_[matrix], format));
    for (int64_t j = 0; j < count_panels(shapes_[matrix].first); ++j)
      quantise_panel(weights_[matrix][size_t(i / 3)], format, j, panel_at(blocks, format, shapes_[matrix].second, j));
  });
  for (auto& list : weights_) list.clear();
}

template <class T>
void ExpertPanels::pack(at::Tensor& blob, bool backward) {
  std::array<int64_t, 4> begin{};
  for (size_t i = 0; i < 3; ++i) begin[i + 1] = begin[i] + elements_of<T>(shapes_[i], backward);
  blob = at::empty({experts_, begin[3]}, at::TensorOptions(kTypeOf<T>));
  at::parallel_for(0, 3 * experts_, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      pack_dense(weights_[i % 3][i / 3], backward, mutable_data<T>(blob) + i / 3 * begin[3] + begin[i % 3]);
  });
  if (on_packed_) on_packed_();
}

template <class T>
void ExpertPanels::prepare_forward() {
  if (!format_) std::call_once(forward_once_, [&] { pack<T>(forward_, false); });
}
template <class T>
void ExpertPanels::prepare_backward() {
  if (stores_backward_) std::call_once(backward_once_, [&] { pack<T>(backward_, true); });
}

template <class T>
Panels<T> ExpertPanels::panels(int64_t expert, Matrix matrix, bool backward) const {
  const auto [out, in] = shapes_[matrix];
  const bool ready = !format_ && (!backward || stores_backward_);
  const at::Tensor& blob = backward && stores_backward_ ? backward_ : forward_;
  int64_t begin = expert * blob.size(1);
  for (int i = 0; i < matrix; ++i)
    begin += format_ ? bytes_of(shapes_[size_t(i)], *format_) : elements_of<T>(shapes_[size_t(i)], ready && backward);
  Panels<T> p{nullptr, backward ? out : in, backward ? in : out};
  if (ready)
    p.data = data<T>(blob) + begin;
  else
    p.stored = {format_ ? static_cast<const void*>(blob.const_data_ptr<uint8_t>() + begin) : data<T>(blob) + begin,
                format_, in, out, backward};
  return p;
}

std::shared_ptr<ExpertPanels> make_expert_panels(const ExpertFfnWeights& weights, OnPacked on_packed, bool lean) {
  if (weights.gate_FD.empty() || weights.gate_EFD.defined() || !weights.gate_FD.front().is_cpu() ||
      !has_block_products(weights.gate_FD.front().scalar_type()))
    return nullptr;
  return std::make_shared<ExpertPanels>(weights, std::move(on_packed),
                                        !(lean && one_layout_serves(weights.gate_FD.front().scalar_type())));
}
bool one_layout_serves(at::ScalarType dtype) {
  return has_block_products(dtype) &&
         (dtype == at::kFloat ? micro_kernel<float>()->turns : micro_kernel<bf16>()->turns);
}

void quantise_experts(ExpertFfnWeights& weights, WeightFormat format) {
  MOEGRAFT_INVARIANT(!weights.gate_FD.empty() && weights.gate_FD.front().is_cpu(),
                     "quantise_experts: frozen experts on the CPU");
  if (quantised_products()) {
    weights.panels = std::make_shared<ExpertPanels>(weights, *block_format(format));
    weights.gate_FD = weights.up_FD = weights.down_DF = ExpertMatrices();
    return;
  }
  for (auto* list : {&weights.gate_FD, &weights.up_FD, &weights.down_DF})
    for (at::Tensor& w : list->own()) w = WeightPanels(w, *block_format(format)).dense();
}

int64_t stored_bytes(const ExpertPanels& quantised) { return quantised.bytes(); }
int64_t ExpertFfnWeights::num_experts() const {
  return gate_FD.empty() && panels ? panels->num_experts() : int64_t(gate_FD.size());
}
int64_t ExpertFfnWeights::expert_width() const {
  return gate_FD.empty() && panels ? panels->expert_width() : gate_FD.front().size(0);
}

#define MOEGRAFT_INSTANTIATE(T)                              \
  template Panels<T> WeightPanels::panels<T>(Layout&, bool); \
  template void ExpertPanels::prepare_forward<T>();          \
  template void ExpertPanels::prepare_backward<T>();         \
  template Panels<T> ExpertPanels::panels<T>(int64_t, Matrix, bool) const;
MOEGRAFT_INSTANTIATE(float)
MOEGRAFT_INSTANTIATE(bf16)
#undef MOEGRAFT_INSTANTIATE

}  // namespace moegraft::kernels
