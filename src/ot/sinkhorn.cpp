#include "moegraft/ot/sinkhorn.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "moegraft/base/check.h"

namespace moegraft::ot {
namespace {

constexpr double kAbsorbAt = 100.0;  // beyond this |log v| the kernel is rebuilt: products stay far from underflow
constexpr double kSmallestColumn = 1e-250;
constexpr int64_t kRateWindow = 20;  // iterations between estimates of the rate
constexpr double kRelaxBelow = 0.1;  // over-relaxation is a local method
constexpr double kLargestRelaxation = 1.995;
constexpr int64_t kBlocks = 16;               // fixed, so that sums do not depend on the number of threads
constexpr int64_t kSerialElements = 1 << 17;  // below, a pass takes less than waking a thread

using Doubles = std::vector<double>;
using Pack = double __attribute__((vector_size(32)));

inline Pack load(const double* x) {
  Pack r;
  std::memcpy(&r, x, sizeof r);
  return r;
}

inline void store(double* x, Pack value) { std::memcpy(x, &value, sizeof value); }

double dot(const double* a, const double* b, int64_t n) {
  Pack s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + 4) * load(b + i + 4);
    s2 += load(a + i + 8) * load(b + i + 8);
    s3 += load(a + i + 12) * load(b + i + 12);
  }
  s0 += s1 + s2 + s3;
  double sum = s0[0] + s0[1] + s0[2] + s0[3];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double* out, double scale, const double* x, int64_t n) {
  int64_t i = 0;
  const Pack s = {scale, scale, scale, scale};
  for (; i + 4 <= n; i += 4) store(out + i, load(out + i) + s * load(x + i));
  for (; i < n; ++i) out[i] += scale * x[i];
}

double relaxed(double old_value, double new_value, double omega) {
  return omega == 1.0 ? new_value : new_value * std::pow(new_value / old_value, omega - 1.0);
}

// One pass over the kernel: u follows K v, and column = K^T u comes along while the row is in cache.
class Kernel {
 public:
  Kernel(const at::Tensor& logits_NM, const at::Tensor& p_N, const at::Tensor& q_M)
      : logits_NM_(logits_NM),
        p_N_(p_N),
        q_M_(q_M),
        n_(logits_NM.size(0)),
        m_(logits_NM.size(1)),
        p_(to_host(p_N)),
        partial_(logits_NM.is_cpu() ? kBlocks * m_ : 0) {}

  // Row-normalised: with u = v = 1 every row sums to p whatever the scale of the logits.
  void build(const at::Tensor& log_v_M) { kernel_NM = at::softmax(logits_NM_ + log_v_M, 1).mul_(p_N_.unsqueeze(1)); }

  // A step in the log domain: reaches columns whose mass underflows in the kernel.
  at::Tensor log_step(const at::Tensor& log_v_M) const {
    const at::Tensor log_u_N = at::log(p_N_) - at::logsumexp(logits_NM_ + log_v_M, 1);
    return at::log(q_M_) - at::logsumexp(logits_NM_ + log_u_N.unsqueeze(1), 0);
  }

  // Returns the row error before the update. update_u false: only the columns.
  double sweep(const Doubles& v, Doubles& u, Doubles& column, double omega, bool update_u) {
    if (!kernel_NM.is_cpu()) return sweep_device(v, u, column, omega, update_u);
    const double* kernel = kernel_NM.const_data_ptr<double>();
    const int64_t blocks = n_ * m_ <= kSerialElements ? 1 : std::min(kBlocks, n_);
    double errors[kBlocks] = {};
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        double* sums = partial_.data() + block * m_;
        std::fill(sums, sums + m_, 0.0);
        for (int64_t i = n_ * block / blocks; i < n_ * (block + 1) / blocks; ++i) {
          const double* row = kernel + i * m_;
          if (update_u) {
            const double s = dot(row, v.data(), m_);
            errors[block] += std::abs(u[i] * s - p_[i]);
            u[i] = relaxed(u[i], p_[i] / s, omega);
          }
          add_scaled(sums, u[i], row, m_);
        }
      }
    });
    std::copy(partial_.begin(), partial_.begin() + m_, column.begin());
    double error = errors[0];
    for (int64_t block = 1; block < blocks; ++block) {
      add_scaled(column.data(), 1.0, partial_.data() + block * m_, m_);
      error += errors[block];
    }
    return error;
  }

  at::Tensor to_device(const Doubles& x) const { return at::tensor(x, at::kDouble).to(logits_NM_.device()); }
  static Doubles to_host(const at::Tensor& x) {
    const at::Tensor host = x.cpu().contiguous();
    return Doubles(host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel());
  }

  at::Tensor kernel_NM;

 private:
  double sweep_device(const Doubles& v, Doubles& u, Doubles& column, double omega, bool update_u) {
    double error = 0;
    if (update_u) {
      const Doubles s = to_host(at::mv(kernel_NM, to_device(v)));
      for (int64_t i = 0; i < n_; ++i) {
        error += std::abs(u[i] * s[i] - p_[i]);
        u[i] = relaxed(u[i], p_[i] / s[i], omega);
      }
    }
    column = to_host(at::mv(kernel_NM.t(), to_device(u)));
    return error;
  }

  const at::Tensor& logits_NM_;
  const at::Tensor& p_N_;
  const at::Tensor& q_M_;
  int64_t n_, m_;
  Doubles p_, partial_;
};

// Chooses the relaxation from the error's decay. Young's relation for the linearised iteration: (rate + w - 1)^2 = rate
// w^2 theta^2, best w = 2 / (1 + sqrt(1 - theta^2)).
class Relaxation {
 public:
  explicit Relaxation(double start) : omega_(start) {}

  double omega() const { return omega_; }

  void observe(int64_t iteration, double error) {
    if (iteration == 0 && error >= kRelaxBelow) omega_ = 1.0;
    if (iteration % kRateWindow) return;
    if (last_ > 0 && error > 0) {
      const double rate = std::pow(error / last_, 1.0 / double(kRateWindow));
      if (rate >= 1.0)
        omega_ = 1.0 + (omega_ - 1.0) * 0.5;
      else if (error < kRelaxBelow && rate > omega_ - 1.0 + 1e-3) {
        const double sum = rate + omega_ - 1.0, theta_squared = std::min(1.0, sum * sum / (rate * omega_ * omega_));
        omega_ = std::clamp(2.0 / (1.0 + std::sqrt(1.0 - theta_squared)), 1.0, kLargestRelaxation);
      }
    }
    last_ = error;
  }

  void reset() { omega_ = 1.0, last_ = 0; }

 private:
  double omega_, last_ = 0;
};

}  // namespace

SinkhornResult sinkhorn(const at::Tensor& logits_NM, const at::Tensor& p_N, const at::Tensor& q_M, SinkhornState& state,
                        int64_t max_iterations, double tolerance) {
  at::NoGradGuard no_grad;
  SinkhornResult result;
  const int64_t n = logits_NM.size(0), m = logits_NM.size(1);
  at::Tensor log_v = state.log_v_M.defined() ? state.log_v_M : at::zeros_like(q_M);
  Kernel kernel(logits_NM, p_N, q_M);
  const Doubles q = Kernel::to_host(q_M);
  Doubles u(n, 1.0), v(m, 1.0), column(m);
  Relaxation relaxation(state.relaxation);
  const auto rebuild = [&](at::Tensor next_log_v) {
    log_v = std::move(next_log_v);
    kernel.build(log_v);
    std::fill(u.begin(), u.end(), 1.0);
    std::fill(v.begin(), v.end(), 1.0);
    kernel.sweep(v, u, column, 1.0, false);
  };
  const auto column_error = [&] {
    double error = 0;
    for (int64_t j = 0; j < m; ++j) error += std::abs(v[j] * column[j] - q[j]);
    return error;
  };
  rebuild(log_v);
  double row_error = 0;
  for (;; ++result.iterations) {
    result.error = column_error();
    result.converged = result.error + row_error <= tolerance;
    if (result.converged || result.iterations >= max_iterations) break;
    if (state.adapt) relaxation.observe(result.iterations, result.error + row_error);
    if (!(*std::min_element(column.begin(), column.end()) > kSmallestColumn)) {
      rebuild(kernel.log_step(log_v + kernel.to_device(v).log()));
      relaxation.reset();
      row_error = 0;
      continue;
    }
    double largest = 1.0, smallest = 1.0;
    for (int64_t j = 0; j < m; ++j) {
      v[j] = relaxed(v[j], q[j] / column[j], relaxation.omega());
      largest = std::max(largest, v[j]);
      smallest = std::min(smallest, v[j]);
    }
    row_error = kernel.sweep(v, u, column, relaxation.omega(), true);
    const bool finite = std::isfinite(row_error) && std::isfinite(largest);
    if (!finite) {
      // An over-relaxed step left the range of double: start again from the last absorbed potential, plainly.
      relaxation.reset();
      rebuild(kernel.log_step(log_v));
      row_error = 0;
    } else if (std::max(std::log(largest), -std::log(smallest)) > kAbsorbAt) {
      rebuild(log_v + kernel.to_device(v).log());
      row_error = 0;
    }
  }
  // Relaxed rows are slightly off: one plain update makes them exact, the columns carry the error.
  if (relaxation.omega() != 1.0) kernel.sweep(v, u, column, 1.0, true);
  result.error = column_error();
  result.plan_NM = kernel.kernel_NM.mul_(kernel.to_device(u).unsqueeze(1)).mul_(kernel.to_device(v));
  state.log_v_M = log_v + kernel.to_device(v).log();
  // The offset is free (row scalings undo it); centred, it stays small over many warm starts.
  state.log_v_M -= state.log_v_M.mean();
  state.relaxation = relaxation.omega();
  return result;
}

void round_to_marginals(at::Tensor& plan_NM, const at::Tensor& p_N, const at::Tensor& q_M) {
  at::NoGradGuard no_grad;
  const at::Tensor rows = plan_NM.sum(1),
                   row_scale = at::where(rows > 0, p_N / rows, at::ones_like(rows)).clamp_max_(1.0);
  plan_NM.mul_(row_scale.unsqueeze(1));
  const at::Tensor columns = plan_NM.sum(0),
                   column_scale = at::where(columns > 0, q_M / columns, at::ones_like(columns)).clamp_max_(1.0);
  plan_NM.mul_(column_scale);
  const at::Tensor missing_N = (p_N - plan_NM.sum(1)).clamp_min_(0.0),
                   missing_M = (q_M - plan_NM.sum(0)).clamp_min_(0.0);
  const double missing = missing_N.sum().item<double>();
  if (missing > 0) plan_NM.addr_(missing_N, missing_M, 1.0, 1.0 / missing);
}

}  // namespace moegraft::ot
