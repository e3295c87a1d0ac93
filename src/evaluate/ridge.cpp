#include "moegraft/evaluate/ridge.h"

#include <algorithm>
#include <limits>

#include "libtorch.h"
#include "moegraft/base/check.h"

namespace moegraft::evaluate {

at::Tensor Ridge::predict(const at::Tensor& x_NF) const {
  return at::mm(x_NF.to(at::kDouble), weight_FP) + (mean_P - at::mv(weight_FP.t(), mean_F));
}

NormalEquations::NormalEquations(int64_t features, int64_t targets)
    : x_F_(at::zeros({features}, at::kDouble)),
      y_P_(at::zeros({targets}, at::kDouble)),
      xx_FF_(at::zeros({features, features}, at::kDouble)),
      xy_FP_(at::zeros({features, targets}, at::kDouble)) {}

void NormalEquations::add(const at::Tensor& x_NF, const at::Tensor& y_NP) {
  MOEGRAFT_INVARIANT(x_NF.size(0) == y_NP.size(0) && x_NF.size(1) == x_F_.size(0) && y_NP.size(1) == y_P_.size(0), "x ",
                     x_NF.sizes().vec(), ", y ", y_NP.sizes().vec(), " for ", xy_FP_.sizes().vec());
  const at::Tensor x = x_NF.to(at::kDouble), y = y_NP.to(at::kDouble), dense = x.is_sparse() ? x.to_dense() : x;
  count_ += x.size(0);
  x_F_ += dense.sum(0);
  y_P_ += y.sum(0);
  xx_FF_ += at::mm(x.t(), dense);  // sparse: its cost is that of the values there are
  xy_FP_ += at::mm(x.t(), y);
  yy_ += y.square().sum().item<double>();
}

NormalEquations NormalEquations::operator+(const NormalEquations& other) const {
  NormalEquations sum(x_F_.size(0), y_P_.size(0));
  sum.count_ = count_ + other.count_;
  sum.x_F_ = x_F_ + other.x_F_, sum.y_P_ = y_P_ + other.y_P_;
  sum.xx_FF_ = xx_FF_ + other.xx_FF_, sum.xy_FP_ = xy_FP_ + other.xy_FP_;
  sum.yy_ = yy_ + other.yy_;
  return sum;
}

NormalEquations::Centred NormalEquations::centred(const at::Tensor& mean_F, const at::Tensor& mean_P) const {
  const double n(count_);
  return {xx_FF_ - at::outer(mean_F, x_F_) - at::outer(x_F_, mean_F) + n * at::outer(mean_F, mean_F),
          xy_FP_ - at::outer(mean_F, y_P_) - at::outer(x_F_, mean_P) + n * at::outer(mean_F, mean_P),
          yy_ - 2 * mean_P.dot(y_P_).item<double>() + n * mean_P.dot(mean_P).item<double>()};
}

double NormalEquations::mean_variance() const {
  return (xx_FF_.diagonal() - x_F_.square() / double(count_)).mean().item<double>();
}

Ridge NormalEquations::solve(double lambda) const {
  const at::Tensor mean_F = x_F_ / double(count_), mean_P = y_P_ / double(count_);
  Centred c = centred(mean_F, mean_P);
  c.xx_FF.diagonal().add_(lambda);
  return {at::cholesky_solve(c.xy_FP, at::linalg_cholesky(c.xx_FF)), mean_F, mean_P, lambda};
}

double NormalEquations::squared_error(const Ridge& ridge) const {
  const Centred c = centred(ridge.mean_F, ridge.mean_P);
  const at::Tensor& w = ridge.weight_FP;
  return c.yy - 2 * (w * c.xy_FP).sum().item<double>() + (w * at::mm(c.xx_FF, w)).sum().item<double>();
}

ChosenRidge choose_ridge(const NormalEquations& rows, const NormalEquations& held_out,
                         const std::vector<double>& ratios) {
  ChosenRidge best;
  best.held_out_error = std::numeric_limits<double>::infinity();
  for (const double ratio : ratios) {
    const Ridge ridge = rows.solve(ratio * rows.mean_variance());
    const double error = held_out.squared_error(ridge) / double(held_out.count() * ridge.mean_P.size(0));
    if (error < best.held_out_error) best.ratio = ratio, best.held_out_error = error;
  }
  const NormalEquations all = rows + held_out;
  best.ridge = all.solve(best.ratio * all.mean_variance());
  return best;
}

}  // namespace moegraft::evaluate
