#include "moegraft/kernels/matrix.h"

#include "libtorch.h"

#include "cpu/panels.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {

Matrix::Matrix(at::Tensor weight_NK) : data_(std::move(weight_NK)) {
  if (!data_.defined()) return;
  MOEGRAFT_INVARIANT(data_.dim() == 2, "Matrix: ", data_.sizes());
  rows_ = data_.size(0), columns_ = data_.size(1);
  format_ = data_.scalar_type() == at::kBFloat16 ? WeightFormat::bfloat16 : WeightFormat::float32;
}

int64_t Matrix::bytes() const { return quantised() ? packed_->bytes() : data_.defined() ? int64_t(data_.nbytes()) : 0; }

const at::Tensor& Matrix::tensor() const {
  MOEGRAFT_INVARIANT(!quantised(), "a ", format_row(format_).name, " matrix is no tensor of numbers");
  return data_;
}

at::Tensor Matrix::dense(at::ScalarType dtype) const { return (quantised() ? packed_->dense() : data_).to(dtype); }

Matrix pack_weight(Matrix m, OnPacked on_packed) {
  const at::Tensor& w = m.data_;
  if (!w.defined() || w.requires_grad() || !w.is_cpu() || !has_block_products(w.scalar_type())) return m;
  m.packed_ =
      std::make_shared<WeightPanels>(w.stride(1) == 1 ? w.detach() : w.detach().contiguous(), std::move(on_packed));
  return m;
}

// Both dtypes have micro-kernels or neither has (cpu_path.cpp).
bool quantised_products() { return has_block_products(at::kFloat) && has_block_products(at::kBFloat16); }

Matrix quantise(const at::Tensor& weight_NK, WeightFormat format) {
  const BlockFormat* blocks = block_format(format);
  MOEGRAFT_INVARIANT(
      blocks && weight_NK.is_cpu() && weight_NK.dim() == 2 && at::isFloatingType(weight_NK.scalar_type()),
      "quantise: ", weight_NK.toString(), " ", weight_NK.sizes());
  Matrix m;
  m.rows_ = weight_NK.size(0), m.columns_ = weight_NK.size(1);
  m.format_ = format;
  m.packed_ = std::make_shared<WeightPanels>(weight_NK.detach(), *blocks);
  return quantised_products() ? m : Matrix(m.packed_->dense());
}

at::Tensor embedding(const Matrix& weight_VD, const at::Tensor& ids, at::ScalarType dtype) {
  if (!weight_VD.quantised()) return at::embedding(weight_VD.tensor(), ids).to(dtype);
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(weight_VD.columns());
  return weight_VD.packed()->dense_rows(ids).to(dtype).view(shape);
}

}  // namespace moegraft::kernels
