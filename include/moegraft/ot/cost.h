#pragma once
// Intra-cloud costs C [n,n] for Gromov-Wasserstein, float64, dense or factored. The squared Euclidean cost |x_i -
// x_j|^2 has rank d+2, so products with it take O(n d) and the matrix itself is never stored (Scetbon et al. 2022,
// arXiv:2106.01128).

#include <torch/types.h>

namespace moegraft::ot {

class Cost {
 public:
  // Any square cost matrix C_NN (symmetric or not). UserError: not square, NaN or Inf.
  static Cost dense(const at::Tensor& matrix_NN);
  // |x_i - x_j|^2 of the rows of points_ND (a vector is read as one column). Factored when that saves work: 2(d+2) <=
  // n. UserError: NaN, Inf, no rows.
  static Cost squared_euclidean(const at::Tensor& points_ND);
  // |x_i - x_j|, dense.
  static Cost euclidean(const at::Tensor& points_ND);

  int64_t size() const { return size_; }
  bool factored() const { return left_.defined(); }
  bool symmetric() const { return symmetric_; }
  at::Device device() const;

  at::Tensor matrix() const;                                    // [n,n]; materialises a factored cost
  double max() const;                                           // largest entry, in row chunks
  double mean() const;                                          // mean entry under uniform weights
  void scale(double factor);                                    // multiplies every entry
  at::Tensor times(const at::Tensor& t_NM) const;               // C T [n,m]
  at::Tensor squares_times(const at::Tensor& weights_N) const;  // (C*C) w [n], elementwise square
  Cost transposed() const;

  // C = left right^T, both [n,r]; undefined when dense.
  const at::Tensor& left() const { return left_; }
  const at::Tensor& right() const { return right_; }

 private:
  at::Tensor matrix_, left_, right_;
  int64_t size_ = 0;
  bool symmetric_ = true;
};

}  // namespace moegraft::ot
