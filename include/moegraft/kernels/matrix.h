#pragma once
// The one value for a weight matrix W [N, K] (y = x W^T): projections, FFNs, heads, embeddings.

#include <torch/types.h>

#include <functional>
#include <memory>

#include "moegraft/kernels/weight_format.h"

namespace moegraft::kernels {

class WeightPanels;  // a frozen matrix laid out for the CPU's products (src/kernels/cpu/panels.h)

// Called once a weight has been read to the end and lies elsewhere, for whoever can give its memory back.
using OnPacked = std::function<void()>;

class Matrix {
 public:
  Matrix() = default;
  Matrix(at::Tensor weight_NK);  // NOLINT: a tensor is one. Floating, frozen or a leaf; undefined: none

  bool defined() const { return data_.defined() || packed_ != nullptr; }
  bool quantised() const { return format_row(format_).quantised(); }
  WeightFormat format() const { return format_; }  // float64, which references use, counts as float32
  int64_t rows() const { return rows_; }           // N
  int64_t columns() const { return columns_; }     // K
  int64_t bytes() const;                           // of its numbers, not of the layouts that products read beside them

  // [N, K] as it is stored. InvariantError where quantised: dense() then.
  const at::Tensor& tensor() const;
  // [N, K] in a floating dtype: the very tensor where it has this dtype, else a copy.
  at::Tensor dense(at::ScalarType dtype) const;

  // Null: products go through ATen.
  const std::shared_ptr<WeightPanels>& packed() const { return packed_; }

 private:
  friend Matrix pack_weight(Matrix, OnPacked);
  friend Matrix quantise(const at::Tensor&, WeightFormat);
  at::Tensor data_;  // undefined where quantised: the panels hold the numbers
  WeightFormat format_ = WeightFormat::float32;
  int64_t rows_ = 0, columns_ = 0;
  std::shared_ptr<WeightPanels> packed_;
};

// The matrix with panels, where they serve: frozen, on a CPU that has the micro-kernels; otherwise as it is. They are
// filled at first use, forward ones and backward ones each by themselves, and take the weight's size each.
Matrix pack_weight(Matrix weight, OnPacked on_packed = nullptr);

// W [N, K] on the CPU, floating, any shape, in a quantised format: panels alone, for both passes. On a CPU without
// micro-kernels (quantised_products()), a float32 matrix of the format's values. UserError: a weight that is no finite
// number or beyond the format's range.
Matrix quantise(const at::Tensor& weight_NK, WeightFormat format);
bool quantised_products();

// Rows ids of W -> [..., K] in `dtype`; differentiable where W is a leaf (of that dtype).
at::Tensor embedding(const Matrix& weight_VD, const at::Tensor& ids, at::ScalarType dtype);

}  // namespace moegraft::kernels
