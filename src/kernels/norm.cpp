// RMSNorm and rotary embedding: one pass over each row on a GPU (cuda/) and on the CPU; elsewhere composed of ATen
// operations.

#include "cpu/block_product.h"
#include "cpu/cpu.h"
#include "cuda/ops.h"
#include "implementations.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRowGrain = 16;

template <class T>
void rms_forward_cpu(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, const at::Tensor& rstd,
                     double eps) {
  const int64_t rows = rstd.numel(), width = x.size(-1);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      mutable_data<float>(rstd)[r] =
          loops<T>().rms_norm(data<T>(x) + r * width, data<T>(w), float(eps), mutable_data<T>(y) + r * width, width);
  });
}

template <class T>
void rms_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& rstd,
                      const at::Tensor& dx) {
  const int64_t rows = rstd.numel(), width = x.size(-1);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      loops<T>().rms_norm_backward(data<T>(dy) + r * width, data<T>(x) + r * width, data<T>(w), data<float>(rstd)[r],
                                   mutable_data<T>(dx) + r * width, width);
  });
}

struct Normed {
  at::Tensor y, rstd;
};
struct RmsNormImplementation {
  bool (*serves)(const at::Tensor& x);
  Normed (*forward)(const at::Tensor& x, const at::Tensor& weight, double eps);
  std::pair<at::Tensor, at::Tensor> (*backward)(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                const at::Tensor& rstd, bool need_dw);  // dx, dw
};
int64_t rows_of(const at::Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

Normed rms_norm_cuda(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const cuda::Norm n = cuda::rms_norm_forward(x, {}, weight, eps, x.scalar_type(), false);
  return {n.y, n.rstd};
}
std::pair<at::Tensor, at::Tensor> rms_norm_backward_cuda(const at::Tensor& dy, const at::Tensor& x,
                                                         const at::Tensor& weight, const at::Tensor& rstd,
                                                         bool need_dw) {
  const cuda::NormGradients g = cuda::rms_norm_backward(dy, {}, {}, x, weight, rstd, need_dw);
  return {g.dx, g.dw};
}

Normed rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor y = at::empty_like(x), rstd = at::empty({rows_of(x)}, x.options().dtype(at::kFloat));
  if (x.scalar_type() == at::kFloat)
    rms_forward_cpu<float>(x, weight, y, rstd, eps);
  else
    rms_forward_cpu<bf16>(x, weight, y, rstd, eps);
  return {y, rstd};
}
std::pair<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
                                                        const at::Tensor& weight, const at::Tensor& rstd,
                                                        bool need_dw) {
  const at::Tensor dx = at::empty_like(x);
  if (x.scalar_type() == at::kFloat)
    rms_backward_cpu<float>(dy, x, weight, rstd, dx);
  else
    rms_backward_cpu<bf16>(dy, x, weight, rstd, dx);
  if (!need_dw) return {dx, {}};
  return {dx, (dy.to(at::kFloat) * x.to(at::kFloat))
                  .view({rows_of(x), x.size(-1)})
                  .mul_(rstd.unsqueeze(-1))
                  .sum(0)
                  .to(weight.scalar_type())};
}

Normed rms_norm_aten(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
                   rstd = at::rsqrt(wide.square().mean(-1, true) + eps);
  return {weight * (wide * rstd).to(x.scalar_type()), rstd};
}
std::pair<at::Tensor, at::Tensor> rms_norm_backward_aten(const at::Tensor& dy, const at::Tensor& x,
                                                         const at::Tensor& weight, const at::Tensor& rstd,
                                                         bool need_dw) {
  const auto wide = rstd.scalar_type();
  const at::Tensor xf = x.to(wide), wdy = dy.to(wide) * weight.to(wide);
  const at::Tensor dx = (rstd * wdy - xf * rstd.pow(3) * (wdy * xf).mean(-1, true)).to(x.scalar_type());
  if (!need_dw) return {dx, {}};
  return {dx, (dy.to(wide) * xf * rstd).reshape({rows_of(x), x.size(-1)}).sum(0).to(weight.scalar_type())};
}

constexpr RmsNormImplementation kRmsNorm[]{
    {cuda::serves, rms_norm_cuda, rms_norm_backward_cuda},
    {has_cpu_path, rms_norm_cpu, rms_norm_backward_cpu},
    {kAlways, rms_norm_aten, rms_norm_backward_aten},
};

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in, const at::Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor x = x_in.contiguous();
    const auto [y, rstd] = choose(kRmsNorm, x).forward(x, weight, eps);
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const auto [dx, dw] =
        choose(kRmsNorm, x).backward(grads[0].contiguous(), x, weight, rstd, ctx->needs_input_grad(1));
    return {dx, dw, at::Tensor()};
  }
};

// The residual stream's add and norm in one pass over the row.
template <class T>
variable_list residual_forward(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& w, double eps,
                               bool also_float, at::Tensor& rstd) {
  const int64_t rows = x.size(0), width = x.size(1);
  const at::Tensor x_out = delta.defined() ? at::empty_like(x) : x,
                   y = at::empty(x.sizes(), x.options().dtype(kTypeOf<T>)),
                   y_float = also_float ? at::empty_like(x) : at::Tensor();
  rstd = at::empty({rows}, x.options());
  const float *xp = data<float>(x), *wp = data<float>(w);
  const T* dp = delta.defined() ? data<T>(delta) : nullptr;
  float *op = delta.defined() ? mutable_data<float>(x_out) : nullptr,
        *fp = also_float ? mutable_data<float>(y_float) : nullptr, *rp = mutable_data<float>(rstd);
  T* yp = mutable_data<T>(y);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * width;
      rp[r] = loops<T>().residual_norm(xp + at, dp ? dp + at : nullptr, op ? op + at : nullptr, wp, float(eps), yp + at,
                                       fp ? fp + at : nullptr, width);
    }
  });
  return {x_out, y, y_float};
}

template <class T>
void residual_backward(const at::Tensor& dx_out, const at::Tensor& dy, const at::Tensor& dy_float, const at::Tensor& x,
                       const at::Tensor& w, const at::Tensor& rstd, const at::Tensor& dx, const at::Tensor& ddelta) {
  const int64_t rows = x.size(0), width = x.size(1);
  const auto at_row = [&](const at::Tensor& t, int64_t at) { return t.defined() ? data<float>(t) + at : nullptr; };
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * width;
      loops<T>().residual_norm_backward(at_row(dx_out, at), dy.defined() ? data<T>(dy) + at : nullptr,
                                        at_row(dy_float, at), data<float>(x) + at, data<float>(w), data<float>(rstd)[r],
                                        mutable_data<float>(dx) + at,
                                        ddelta.defined() ? mutable_data<T>(ddelta) + at : nullptr, width);
    }
  });
}

struct ResidualCall {
  const at::Tensor &x, &delta, &weight;  // delta undefined: none
  double eps;
  at::ScalarType dtype;  // of y and delta
  bool also_float;
};
struct ResidualNormed {
  at::Tensor sum, y, y_float;  // y_float undefined: not asked for
  at::Tensor w, rstd;          // what the backward pass wants beside the sum
};
struct ResidualBackward {
  at::Tensor dy, dx_out, dy_float;  // undefined: zero
  const at::Tensor &sum, &w, &rstd;
  at::ScalarType dtype, weight_dtype;
  bool need_delta, need_dw;  // need_delta: as a tensor of its own where dtype is not the sum's
};
struct ResidualGradients {
  at::Tensor dx, ddelta, dw;  // ddelta undefined: dx, or not needed
};

ResidualNormed residual_norm_cuda(const ResidualCall& c) {
  const cuda::Norm n = cuda::rms_norm_forward(c.x, c.delta, c.weight, c.eps, c.dtype, c.also_float);
  return {n.sum, n.y, n.y_wide, c.weight, n.rstd};
}
ResidualGradients residual_norm_backward_cuda(const ResidualBackward& b) {
  const cuda::NormGradients g = cuda::rms_norm_backward(b.dy, b.dy_float, b.dx_out, b.sum, b.w, b.rstd, b.need_dw);
  return {g.dx, b.need_delta ? g.dx.to(b.dtype) : at::Tensor(), g.dw};
}

ResidualNormed residual_norm_cpu(const ResidualCall& c) {
  ResidualNormed out;
  out.w = c.weight.to(at::kFloat).contiguous();
  const variable_list made = c.dtype == at::kFloat
                                 ? residual_forward<float>(c.x, c.delta, out.w, c.eps, c.also_float, out.rstd)
                                 : residual_forward<bf16>(c.x, c.delta, out.w, c.eps, c.also_float, out.rstd);
  out.sum = made[0], out.y = made[1], out.y_float = made[2];
  return out;
}
ResidualGradients residual_norm_backward_cpu(const ResidualBackward& b) {
  ResidualGradients g;
  g.dx = at::empty_like(b.sum);
  if (b.need_delta && b.dtype == at::kBFloat16)
    g.ddelta = at::empty(b.sum.sizes(), b.sum.options().dtype(at::kBFloat16));
  if (b.dtype == at::kBFloat16)
    residual_backward<bf16>(b.dx_out, b.dy, b.dy_float, b.sum, b.w, b.rstd, g.dx, g.ddelta);
  else
    residual_backward<float>(b.dx_out, b.dy, b.dy_float, b.sum, b.w, b.rstd, g.dx, g.ddelta);
  if (b.need_dw) {
    at::Tensor total = b.dy.defined() ? b.dy.to(at::kFloat) : at::zeros_like(b.sum);
    if (b.dy_float.defined()) total = total + b.dy_float;
    g.dw = (total * b.sum).mul_(b.rstd.unsqueeze(-1)).sum(0).to(b.weight_dtype);
  }
  return g;
}

struct ResidualImplementation {
  bool (*serves)(const at::Tensor& x);
  ResidualNormed (*forward)(const ResidualCall&);
  ResidualGradients (*backward)(const ResidualBackward&);
};
constexpr ResidualImplementation kResidualNorm[]{
    {cuda::serves, residual_norm_cuda, residual_norm_backward_cuda},
    {kAlways, residual_norm_cpu, residual_norm_backward_cpu},
};

class ResidualNormFunction : public torch::autograd::Function<ResidualNormFunction> {
 public:
  // delta_or_none: one-dimensional when there is none (autograd takes no undefined inputs).
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& delta_or_none,
                               const at::Tensor& weight, double eps, at::ScalarType dtype, bool also_float) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor delta = delta_or_none.dim() == 2 ? delta_or_none : at::Tensor();
    ctx->set_materialize_grads(false);
    const ResidualNormed out = choose(kResidualNorm, x).forward({x, delta, weight, eps, dtype, also_float});
    ctx->save_for_backward({out.sum, out.w, out.rstd});
    ctx->saved_data["bf16"] = dtype == at::kBFloat16;
    ctx->saved_data["weight"] = int64_t(weight.scalar_type());
    variable_list result{out.y};
    if (delta.defined()) result.push_back(out.sum);
    if (also_float) result.push_back(out.y_float);
    ctx->saved_data["delta"] = delta.defined();
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const bool has_delta = ctx->saved_data["delta"].toBool(), low = ctx->saved_data["bf16"].toBool();
    const auto dense = [](const at::Tensor& t) { return t.defined() ? t.contiguous() : t; };
    const ResidualGradients g =
        choose(kResidualNorm, saved[0])
            .backward({dense(grads[0]), has_delta ? dense(grads[1]) : at::Tensor(),
                       grads.size() > size_t(has_delta) + 1 ? dense(grads[has_delta + 1]) : at::Tensor(), saved[0],
                       saved[1], saved[2], low ? at::kBFloat16 : at::kFloat,
                       at::ScalarType(ctx->saved_data["weight"].toInt()), has_delta && low && ctx->needs_input_grad(1),
                       ctx->needs_input_grad(2)});
    return {g.dx, has_delta ? (low ? g.ddelta : g.dx) : at::Tensor(), g.dw, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

ResidualNorm residual_in_one_pass(const ResidualCall& c) {
  const bool twice = c.also_float && c.dtype != at::kFloat;  // in float32 the two are one
  const at::Tensor x = c.x.contiguous(), delta = c.delta.defined() ? c.delta.contiguous() : c.delta;
  if (!recorded(c.x, c.delta, c.weight)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const ResidualNormed n = choose(kResidualNorm, x).forward({x, delta, c.weight, c.eps, c.dtype, twice});
    return {n.sum, n.y, twice ? n.y_float : c.also_float ? n.y : at::Tensor()};
  }
  const variable_list result =
      ResidualNormFunction::apply(x, delta.defined() ? delta : at::empty({0}), c.weight, c.eps, c.dtype, twice);
  ResidualNorm out;
  out.y_XD = result[0];
  out.x_XD = delta.defined() ? result[1] : c.x;
  if (c.also_float) out.y_float_XD = twice ? result.back() : out.y_XD;
  return out;
}
ResidualNorm residual_composed(const ResidualCall& c) {
  ResidualNorm out;
  out.x_XD = c.delta.defined() ? c.x + c.delta : c.x;
  const at::Tensor y = rms_norm(out.x_XD, c.weight.to(c.x.scalar_type()), c.eps);
  out.y_XD = y.to(c.dtype);
  if (c.also_float) out.y_float_XD = y;
  return out;
}

struct ResidualOperation {
  bool (*serves)(const ResidualCall&);
  ResidualNorm (*run)(const ResidualCall&);
};
constexpr ResidualOperation kResidualOperations[]{
    {[](const ResidualCall& c) {
       return (c.x.is_cpu() || cuda::serves(c.x)) && c.x.scalar_type() == at::kFloat &&
              (c.dtype == at::kFloat || c.dtype == at::kBFloat16) &&
              (!c.delta.defined() || c.delta.scalar_type() == c.dtype);
     },
     residual_in_one_pass},
    {kAlways, residual_composed},
};

template <class T>
void rotary_cpu(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& y, float sign) {
  const int64_t tokens = x.size(0), heads = x.size(1), width = x.size(2), half = width / 2;
  at::parallel_for(0, tokens, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (t * heads + h) * width;
        loops<T>().rotate(data<T>(x) + at, data<float>(cos) + t * half, data<float>(sin) + t * half, sign,
                          mutable_data<T>(y) + at, half);
      }
  });
}

struct Rotation {
  const at::Tensor &x_THC, &cos_TC, &sin_TC;
  float sign;  // -1: the backward pass
};
at::Tensor rotate_cpu(const Rotation& r) {
  const at::Tensor x = r.x_THC.contiguous(), y = at::empty_like(x);
  if (x.scalar_type() == at::kFloat)
    rotary_cpu<float>(x, r.cos_TC, r.sin_TC, y, r.sign);
  else
    rotary_cpu<bf16>(x, r.cos_TC, r.sin_TC, y, r.sign);
  return y;
}
at::Tensor rotate_aten(const Rotation& r) {
  const auto halves = r.x_THC.contiguous().chunk(2, -1);
  const at::Tensor c = r.cos_TC.unsqueeze(1), s = r.sin_TC.unsqueeze(1) * r.sign;
  return at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1).to(r.x_THC.scalar_type());
}

struct RotaryImplementation {
  bool (*serves)(const Rotation&);
  at::Tensor (*run)(const Rotation&);
};
constexpr RotaryImplementation kRotary[]{
    {[](const Rotation& r) { return cuda::serves(r.x_THC); },
     [](const Rotation& r) { return cuda::rotary(r.x_THC, r.cos_TC, r.sin_TC, r.sign); }},
    {[](const Rotation& r) { return has_cpu_path(r.x_THC); }, rotate_cpu},
    {kAlways, rotate_aten},
};
at::Tensor rotate(const Rotation& r) { return choose(kRotary, r).run(r); }

class Rotary : public torch::autograd::Function<Rotary> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    return rotate({x, cos, sin, 1.0f});
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    return {rotate({grads[0], saved[0], saved[1], -1.0f}), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x_XD, const at::Tensor& weight_D, double eps) {
  RECORD_FUNCTION("moegraft::rms_norm", {});
  MOEGRAFT_INVARIANT(weight_D.dim() == 1 && x_XD.size(-1) == weight_D.size(0), "rms_norm: x ", x_XD.sizes(),
                     ", weight ", weight_D.sizes());
  return RmsNorm::apply(x_XD, weight_D.contiguous(), eps);
}

ResidualNorm residual_norm(const at::Tensor& x_XD, const at::Tensor& delta_XD, const at::Tensor& weight_D, double eps,
                           at::ScalarType dtype, bool also_float) {
  RECORD_FUNCTION("moegraft::residual_norm", {});
  MOEGRAFT_INVARIANT(x_XD.dim() == 2 && weight_D.dim() == 1 && x_XD.size(1) == weight_D.size(0), "residual_norm: x ",
                     x_XD.sizes(), ", weight ", weight_D.sizes());
  const ResidualCall call{x_XD, delta_XD, weight_D, eps, dtype, also_float};
  return choose(kResidualOperations, call).run(call);
}

at::Tensor rotary(const at::Tensor& x_THC, const at::Tensor& cos_TC, const at::Tensor& sin_TC) {
  RECORD_FUNCTION("moegraft::rotary", {});
  MOEGRAFT_INVARIANT(x_THC.dim() == 3 && cos_TC.size(0) == x_THC.size(0) && 2 * cos_TC.size(1) == x_THC.size(2),
                     "rotary: x ", x_THC.sizes(), ", cos ", cos_TC.sizes());
  return Rotary::apply(x_THC, cos_TC, sin_TC);
}

}  // namespace moegraft::kernels
