#pragma once
// Ridge regression with an intercept, by the normal equations in float64: what a linear map from features to targets
// can do.

#include <torch/types.h>

#include <vector>

namespace moegraft::evaluate {

// y = (x - mean_F) weight_FP + mean_P; minimises |y - prediction|^2 + lambda |weight|^2 (scikit-learn's Ridge).
// float64.
struct Ridge {
  at::Tensor weight_FP, mean_F, mean_P;
  double lambda = 0;
  at::Tensor predict(const at::Tensor& x_NF) const;  // dense or sparse COO -> [N, P]
};

// The sums that a fit needs of its rows, F^2 + F P numbers however many rows there are.
class NormalEquations {
 public:
  NormalEquations(int64_t features, int64_t targets);
  void add(const at::Tensor& x_NF, const at::Tensor& y_NP);  // x dense or sparse COO; any floating dtype
  NormalEquations operator+(const NormalEquations& other) const;

  int64_t count() const { return count_; }
  double mean_variance() const;  // of a feature, times the rows: what lambda is measured by
  Ridge solve(double lambda)
      const;  // by Cholesky. lambda > 0; without rows or with values that are not finite LibTorch's error
  double squared_error(const Ridge& ridge) const;  // summed over rows and targets

 private:
  struct Centred {
    at::Tensor xx_FF, xy_FP;
    double yy;
  };
  Centred centred(const at::Tensor& mean_F, const at::Tensor& mean_P) const;
  int64_t count_ = 0;
  at::Tensor x_F_, y_P_, xx_FF_, xy_FP_;
  double yy_ = 0;
};

// Of the penalties r * rows.mean_variance(), r in `ratios`, the one with the smallest error on held_out, fitted again
// to both.
struct ChosenRidge {
  Ridge ridge;
  double ratio = 0, held_out_error = 0;  // mean squared error of a target, before the second fit
};
ChosenRidge choose_ridge(const NormalEquations& rows, const NormalEquations& held_out,
                         const std::vector<double>& ratios);

}  // namespace moegraft::evaluate
