#include "moegraft/ot/cost.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "moegraft/base/check.h"

namespace moegraft::ot {
namespace {

constexpr int64_t kChunkElements = int64_t{1} << 22;
constexpr int64_t kCdistWithoutMatmul = 2;  // at::cdist's exact mode: differences first, no cancellation

at::Tensor checked_points(const at::Tensor& points) {
  MOEGRAFT_CHECK(points.defined() && (points.dim() == 1 || points.dim() == 2) && points.numel() > 0,
                 "a point cloud must be a non-empty matrix [points, dimensions], got ",
                 points.defined() ? points.sizes().vec() : std::vector<int64_t>{});
  MOEGRAFT_CHECK(at::isFloatingType(points.scalar_type()), "a point cloud must hold floating-point numbers, got ",
                 points.dtype().name());
  at::Tensor x = points.detach().to(at::kDouble);
  if (x.dim() == 1) x = x.unsqueeze(1);
  MOEGRAFT_CHECK(x.isfinite().all().item<bool>(), "a point cloud of ", x.size(0), " points holds NaN or Inf");
  return x;
}

}  // namespace

Cost Cost::dense(const at::Tensor& matrix_NN) {
  at::NoGradGuard no_grad;
  MOEGRAFT_CHECK(
      matrix_NN.defined() && matrix_NN.dim() == 2 && matrix_NN.size(0) == matrix_NN.size(1) && matrix_NN.size(0) > 0,
      "a cost must be a square matrix, got ", matrix_NN.defined() ? matrix_NN.sizes().vec() : std::vector<int64_t>{});
  Cost cost;
  cost.matrix_ = matrix_NN.detach().to(at::kDouble).contiguous();
  MOEGRAFT_CHECK(cost.matrix_.isfinite().all().item<bool>(), "a cost matrix of ", matrix_NN.size(0),
                 " points holds NaN or Inf");
  cost.size_ = matrix_NN.size(0);
  cost.symmetric_ = at::allclose(cost.matrix_, cost.matrix_.t(), 1e-5, 1e-10);
  return cost;
}

Cost Cost::squared_euclidean(const at::Tensor& points_ND) {
  at::NoGradGuard no_grad;
  at::Tensor x = checked_points(points_ND);
  if (2 * (x.size(1) + 2) > x.size(0)) {
    Cost cost;
    cost.matrix_ = at::cdist(x, x, 2.0, kCdistWithoutMatmul).square_();
    cost.size_ = x.size(0);
    return cost;
  }
  // Distances do not see a shift: small numbers cancel less. First by a row, so that equal points become exact zeros.
  x = x - x[0];
  x = x - x.mean(0);
  const at::Tensor norms = x.square().sum(1, true), ones = at::ones_like(norms);
  Cost cost;
  cost.left_ = at::cat({norms, ones, x * -2.0}, 1);
  cost.right_ = at::cat({ones, norms, x}, 1);
  cost.size_ = x.size(0);
  return cost;
}

Cost Cost::euclidean(const at::Tensor& points_ND) {
  at::NoGradGuard no_grad;
  const at::Tensor x = checked_points(points_ND);
  Cost cost;
  cost.matrix_ = at::cdist(x, x, 2.0, kCdistWithoutMatmul);
  cost.size_ = x.size(0);
  return cost;
}

at::Device Cost::device() const { return factored() ? left_.device() : matrix_.device(); }

at::Tensor Cost::matrix() const {
  if (!factored()) return matrix_;
  // Only squared distances are factored: the rounding of their diagonal would show in a logarithm.
  return at::mm(left_, right_.t()).clamp_min_(0.0).fill_diagonal_(0.0);
}

double Cost::max() const {
  if (!factored()) return matrix_.max().item<double>();
  double largest = 0;
  const int64_t step = std::max<int64_t>(1, kChunkElements / size_);
  for (int64_t i = 0; i < size_; i += step) {
    largest = std::max(largest, at::mm(left_.slice(0, i, std::min(size_, i + step)), right_.t()).max().item<double>());
  }
  return largest;
}

double Cost::mean() const {
  if (!factored()) return matrix_.mean().item<double>();
  return (left_.mean(0) * right_.mean(0)).sum().item<double>();
}

void Cost::scale(double factor) {
  if (factored())
    left_ = left_ * factor;
  else
    matrix_ = matrix_ * factor;
}

at::Tensor Cost::times(const at::Tensor& t_NM) const {
  return factored() ? at::mm(left_, at::mm(right_.t(), t_NM)) : at::mm(matrix_, t_NM);
}

at::Tensor Cost::squares_times(const at::Tensor& weights_N) const {
  if (!factored()) return at::mv(matrix_.square(), weights_N);
  // sum_j (l_i . r_j)^2 w_j = l_i^T (sum_j w_j r_j r_j^T) l_i
  const at::Tensor moment = at::mm(right_.t(), right_ * weights_N.unsqueeze(1));
  return (at::mm(left_, moment) * left_).sum(1);
}

Cost Cost::transposed() const {
  Cost cost = *this;
  if (factored())
    std::swap(cost.left_, cost.right_);
  else
    cost.matrix_ = matrix_.t();
  return cost;
}

}  // namespace moegraft::ot
