// RMSNorm and rotary embedding. One pass over each row on the CPU and on a GPU (cuda/); elsewhere composed of ATen operations.

#include "block_product.h"
#include "cpu.h"
#include "cuda/ops.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRowGrain = 16;

template <class T>
void rms_forward_cpu(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, const at::Tensor& rstd, double eps) {
  const int64_t rows = rstd.numel(), width = x.size(-1);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) mutable_data<float>(rstd)[r] = loops<T>().rms_norm(data<T>(x) + r * width, data<T>(w), float(eps), mutable_data<T>(y) + r * width, width);
  });
}

template <class T>
void rms_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& rstd, const at::Tensor& dx) {
  const int64_t rows = rstd.numel(), width = x.size(-1);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      loops<T>().rms_norm_backward(data<T>(dy) + r * width, data<T>(x) + r * width, data<T>(w), data<float>(rstd)[r], mutable_data<T>(dx) + r * width, width);
  });
}

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in, const at::Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor x = x_in.contiguous();
    const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
    at::Tensor y, rstd;
    if (cuda::serves(x)) {
      const cuda::Norm n = cuda::rms_norm_forward(x, {}, weight, eps, x.scalar_type(), false);
      y = n.y;
      rstd = n.rstd;
    } else if (has_cpu_path(x)) {
      y = at::empty_like(x);
      rstd = at::empty({rows}, x.options().dtype(at::kFloat));
      if (x.scalar_type() == at::kFloat) rms_forward_cpu<float>(x, weight, y, rstd, eps);
      else rms_forward_cpu<bf16>(x, weight, y, rstd, eps);
    } else {
      const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor xf = x.to(wide);
      rstd = at::rsqrt(xf.square().mean(-1, true) + eps);
      y = weight * (xf * rstd).to(x.scalar_type());
    }
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const at::Tensor dy = grads[0].contiguous();
    const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
    at::Tensor dx, dw;
    if (cuda::serves(x)) {
      const cuda::NormGradients g = cuda::rms_norm_backward(dy, {}, {}, x, weight, rstd, ctx->needs_input_grad(1));
      dx = g.dx;
      dw = g.dw;
    } else if (has_cpu_path(x)) {
      dx = at::empty_like(x);
      if (x.scalar_type() == at::kFloat) rms_backward_cpu<float>(dy, x, weight, rstd, dx);
      else rms_backward_cpu<bf16>(dy, x, weight, rstd, dx);
      if (ctx->needs_input_grad(1)) dw = (dy.to(at::kFloat) * x.to(at::kFloat)).view({rows, width}).mul_(rstd.unsqueeze(-1)).sum(0).to(weight.scalar_type());
    } else {
      const auto wide = rstd.scalar_type();
      const at::Tensor xf = x.to(wide), wdy = dy.to(wide) * weight.to(wide);
      dx = (rstd * wdy - xf * rstd.pow(3) * (wdy * xf).mean(-1, true)).to(x.scalar_type());
      if (ctx->needs_input_grad(1)) dw = (dy.to(wide) * xf * rstd).reshape({rows, width}).sum(0).to(weight.scalar_type());
    }
    return {dx, dw, at::Tensor()};
  }
};

// The residual stream's add and norm in one pass over the row.
template <class T>
variable_list residual_forward(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& w, double eps, bool also_float, at::Tensor& rstd) {
  const int64_t rows = x.size(0), width = x.size(1);
  const at::Tensor x_out = delta.defined() ? at::empty_like(x) : x, y = at::empty(x.sizes(), x.options().dtype(kTypeOf<T>)), y_float = also_float ? at::empty_like(x) : at::Tensor();
  rstd = at::empty({rows}, x.options());
  const float *xp = data<float>(x), *wp = data<float>(w);
  const T* dp = delta.defined() ? data<T>(delta) : nullptr;
  float *op = delta.defined() ? mutable_data<float>(x_out) : nullptr, *fp = also_float ? mutable_data<float>(y_float) : nullptr, *rp = mutable_data<float>(rstd);
  T* yp = mutable_data<T>(y);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * width;
      rp[r] = loops<T>().residual_norm(xp + at, dp ? dp + at : nullptr, op ? op + at : nullptr, wp, float(eps), yp + at, fp ? fp + at : nullptr, width);
    }
  });
  return {x_out, y, y_float};
}

template <class T>
void residual_backward(const at::Tensor& dx_out, const at::Tensor& dy, const at::Tensor& dy_float, const at::Tensor& x, const at::Tensor& w, const at::Tensor& rstd, const at::Tensor& dx,
                       const at::Tensor& ddelta) {
  const int64_t rows = x.size(0), width = x.size(1);
  const auto at_row = [&](const at::Tensor& t, int64_t at) { return t.defined() ? data<float>(t) + at : nullptr; };
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * width;
      loops<T>().residual_norm_backward(at_row(dx_out, at), dy.defined() ? data<T>(dy) + at : nullptr, at_row(dy_float, at), data<float>(x) + at, data<float>(w), data<float>(rstd)[r],
                                        mutable_data<float>(dx) + at, ddelta.defined() ? mutable_data<T>(ddelta) + at : nullptr, width);
    }
  });
}

// The sum, its norm in `dtype` and (also_float) in float32; what the backward pass wants beside them: rstd and w.
variable_list residual_norm_forward(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight, double eps, at::ScalarType dtype, bool also_float, at::Tensor& w, at::Tensor& rstd) {
  if (cuda::serves(x)) {
    const cuda::Norm n = cuda::rms_norm_forward(x, delta, weight, eps, dtype, also_float);
    w = weight, rstd = n.rstd;
    return {n.sum, n.y, n.y_wide};
  }
  w = weight.to(at::kFloat).contiguous();
  return dtype == at::kFloat ? residual_forward<float>(x, delta, w, eps, also_float, rstd) : residual_forward<bf16>(x, delta, w, eps, also_float, rstd);
}

class ResidualNormFunction : public torch::autograd::Function<ResidualNormFunction> {
 public:
  // delta_or_none: one-dimensional when there is none (autograd takes no undefined inputs).
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& delta_or_none, const at::Tensor& weight, double eps, at::ScalarType dtype, bool also_float) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor delta = delta_or_none.dim() == 2 ? delta_or_none : at::Tensor();
    ctx->set_materialize_grads(false);
    at::Tensor w, rstd;
    const variable_list out = residual_norm_forward(x, delta, weight, eps, dtype, also_float, w, rstd);
    ctx->save_for_backward({out[0], w, rstd});
    ctx->saved_data["bf16"] = dtype == at::kBFloat16;
    ctx->saved_data["weight"] = int64_t(weight.scalar_type());
    variable_list result{out[1]};
    if (delta.defined()) result.push_back(out[0]);
    if (also_float) result.push_back(out[2]);
    ctx->saved_data["delta"] = delta.defined();
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w = saved[1], &rstd = saved[2];
    const bool has_delta = ctx->saved_data["delta"].toBool(), low = ctx->saved_data["bf16"].toBool();
    const auto dense = [](const at::Tensor& t) { return t.defined() ? t.contiguous() : t; };
    const at::Tensor dy = dense(grads[0]), dx_out = has_delta ? dense(grads[1]) : at::Tensor(), dy_float = grads.size() > size_t(has_delta) + 1 ? dense(grads[has_delta + 1]) : at::Tensor();
    if (cuda::serves(x)) {
      const cuda::NormGradients g = cuda::rms_norm_backward(dy, dy_float, dx_out, x, w, rstd, ctx->needs_input_grad(2));
      return {g.dx, has_delta ? g.dx.to(low ? at::kBFloat16 : at::kFloat) : at::Tensor(), g.dw, at::Tensor(), at::Tensor(), at::Tensor()};
    }
    const at::Tensor dx = at::empty_like(x), ddelta = has_delta && low && ctx->needs_input_grad(1) ? at::empty(x.sizes(), x.options().dtype(at::kBFloat16)) : at::Tensor();
    if (low) residual_backward<bf16>(dx_out, dy, dy_float, x, w, rstd, dx, ddelta);
    else residual_backward<float>(dx_out, dy, dy_float, x, w, rstd, dx, ddelta);
    at::Tensor dw;
    if (ctx->needs_input_grad(2)) {
      at::Tensor total = dy.defined() ? dy.to(at::kFloat) : at::zeros_like(x);
      if (dy_float.defined()) total = total + dy_float;
      dw = (total * x).mul_(rstd.unsqueeze(-1)).sum(0).to(at::ScalarType(ctx->saved_data["weight"].toInt()));
    }
    return {dx, has_delta ? (low ? ddelta : dx) : at::Tensor(), dw, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

template <class T>
void rotary_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& y, float sign) {
  const int64_t tokens = x.size(0), heads = x.size(1), width = x.size(2), half = width / 2;
  at::parallel_for(0, tokens, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (t * heads + h) * width;
        loops<T>().rotate(data<T>(x) + at, data<float>(cos) + t * half, data<float>(sin) + t * half, sign, mutable_data<T>(y) + at, half);
      }
  });
}

at::Tensor rotate(const at::Tensor& x_in, const at::Tensor& cos, const at::Tensor& sin, float sign) {
  if (cuda::serves(x_in)) return cuda::rotary(x_in, cos, sin, sign);
  const at::Tensor x = x_in.contiguous();
  if (has_cpu_path(x)) {
    at::Tensor y = at::empty_like(x);
    if (x.scalar_type() == at::kFloat) rotary_cpu<float>(x, cos, sin, y, sign);
    else rotary_cpu<bf16>(x, cos, sin, y, sign);
    return y;
  }
  const auto halves = x.chunk(2, -1);
  const at::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1) * sign;
  return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1).to(x.scalar_type());
}

class Rotary : public torch::autograd::Function<Rotary> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    return rotate(x, cos, sin, 1.0f);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    return {rotate(grads[0], saved[0], saved[1], -1.0f), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x_XD, const at::Tensor& weight_D, double eps) {
  RECORD_FUNCTION("moegraft::rms_norm", {});
  MOEGRAFT_INVARIANT(weight_D.dim() == 1 && x_XD.size(-1) == weight_D.size(0), "rms_norm: x ", x_XD.sizes(), ", weight ", weight_D.sizes());
  return RmsNorm::apply(x_XD, weight_D.contiguous(), eps);
}

ResidualNorm residual_norm(const at::Tensor& x_XD, const at::Tensor& delta_XD, const at::Tensor& weight_D, double eps, at::ScalarType dtype, bool also_float) {
  RECORD_FUNCTION("moegraft::residual_norm", {});
  MOEGRAFT_INVARIANT(x_XD.dim() == 2 && weight_D.dim() == 1 && x_XD.size(1) == weight_D.size(0), "residual_norm: x ", x_XD.sizes(), ", weight ", weight_D.sizes());
  ResidualNorm out;
  const bool fused = (x_XD.is_cpu() || cuda::serves(x_XD)) && x_XD.scalar_type() == at::kFloat && (dtype == at::kFloat || dtype == at::kBFloat16) && (!delta_XD.defined() || delta_XD.scalar_type() == dtype);
  if (fused) {
    const bool twice = also_float && dtype != at::kFloat;  // in float32 the two are one
    if (!recorded(x_XD, delta_XD, weight_D)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      at::Tensor w, rstd;
      const variable_list result = residual_norm_forward(x_XD.contiguous(), delta_XD.defined() ? delta_XD.contiguous() : delta_XD, weight_D, eps, dtype, twice, w, rstd);
      return {result[0], result[1], twice ? result[2] : also_float ? result[1] : at::Tensor()};
    }
    const variable_list result = ResidualNormFunction::apply(x_XD.contiguous(), delta_XD.defined() ? delta_XD.contiguous() : at::empty({0}), weight_D, eps, dtype, twice);
    out.y_XD = result[0];
    out.x_XD = delta_XD.defined() ? result[1] : x_XD;
    if (also_float) out.y_float_XD = twice ? result.back() : out.y_XD;
    return out;
  }
  out.x_XD = delta_XD.defined() ? x_XD + delta_XD : x_XD;
  const at::Tensor y = rms_norm(out.x_XD, weight_D.to(x_XD.scalar_type()), eps);
  out.y_XD = y.to(dtype);
  if (also_float) out.y_float_XD = y;
  return out;
}

at::Tensor rotary(const at::Tensor& x_THC, const at::Tensor& cos_TC, const at::Tensor& sin_TC) {
  RECORD_FUNCTION("moegraft::rotary", {});
  MOEGRAFT_INVARIANT(x_THC.dim() == 3 && cos_TC.size(0) == x_THC.size(0) && 2 * cos_TC.size(1) == x_THC.size(2), "rotary: x ", x_THC.sizes(), ", cos ", cos_TC.sizes());
  return Rotary::apply(x_THC, cos_TC, sin_TC);
}

}  // namespace moegraft::kernels
