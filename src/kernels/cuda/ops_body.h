#pragma once
// The leaf operations over tensors, for any way to run a functor: the device (ops.cpp), or the host in tests.

#include "dispatch_kernels.h"
#include "loss_kernels.h"
#include "moegraft/base/check.h"
#include "norm_kernels.h"
#include "ops.h"
#include "route_kernels.h"
#include "routing_kernels.h"
#include "row_kernels.h"
#include "swiglu_kernels.h"

namespace moegraft::kernels::cuda {

template <class T>
const T* in(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}
template <class T>
T* out(const at::Tensor& t) {
  return t.defined() ? t.data_ptr<T>() : nullptr;
}

// Calls f with a value of the element type.
template <class F>
auto with_type(at::ScalarType type, const F& f) {
  if (type == at::kFloat) return f(float{});
  MOEGRAFT_INVARIANT(type == at::kBFloat16, "device kernels take float32 and bfloat16, got ", c10::toString(type));
  return f(bf16{});
}
// Calls f with std::integral_constant V: 8 where rows, starts and strides of all of these allow packs, else 1.
inline bool packs(int64_t width, std::initializer_list<at::Tensor> tensors) {
  if (width % 8 != 0) return false;
  for (const auto& t : tensors) {
    if (!t.defined()) continue;
    if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
    for (int64_t d = 0; d + 1 < t.dim(); ++d)
      if (t.size(d) > 1 && t.stride(d) % 8 != 0) return false;
  }
  return true;
}
// Contiguous, and starting where packs can be read when the row's width allows them: for sums over rows, whose order
// must follow from shapes alone.
inline at::Tensor dense(const at::Tensor& t) {
  if (!t.defined()) return t;
  const at::Tensor c = t.contiguous();
  return c.size(-1) % 8 == 0 && reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 != 0 ? c.clone() : c;
}
template <class F>
auto with_pack(bool packed, const F& f) {
  if (packed) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, 1>{});
}

template <class Run>
struct Ops {
  static Norm rms_norm_forward(const at::Tensor& x_in, const at::Tensor& delta_in, const at::Tensor& weight, double eps,
                               at::ScalarType to, bool wide) {
    const at::Tensor x = dense(x_in), w = dense(weight), delta = delta_in.defined() ? dense(delta_in.to(to)) : delta_in;
    MOEGRAFT_INVARIANT(x.size(-1) == w.size(0) && (!delta.defined() || delta.sizes() == x.sizes()), "rms_norm: x ",
                       x.sizes(), ", weight ", w.sizes());
    MOEGRAFT_INVARIANT(x.scalar_type() == at::kFloat || to == x.scalar_type(), "rms_norm: ", c10::toString(to),
                       " from ", c10::toString(x.scalar_type()));
    const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
    Norm result{at::empty(x.sizes(), x.options().dtype(to)),
                wide ? at::empty(x.sizes(), x.options().dtype(at::kFloat)) : at::Tensor(),
                delta.defined() ? at::empty_like(x) : x, at::empty({rows}, x.options().dtype(at::kFloat))};
    norm_types(x, w, to, packs(width, {x, w, delta, result.y}), [&](auto tx, auto tw, auto ty, auto v) {
      using TX = decltype(tx);
      using TY = decltype(ty);
      Run::rows(
          RmsNormForward<TX, decltype(tw), TY, v()>{in<TX>(x), in<TY>(delta), in<decltype(tw)>(w), out<TX>(result.sum),
                                                    out<TY>(result.y), out<float>(result.y_wide),
                                                    out<float>(result.rstd), width, float(eps)},
          rows);
    });
    return result;
  }

  static NormGradients rms_norm_backward(const at::Tensor& dy_in, const at::Tensor& wide_in, const at::Tensor& dsum_in,
                                         const at::Tensor& sum_in, const at::Tensor& weight, const at::Tensor& rstd,
                                         bool need_dw) {
    const at::Tensor dy = dense(dy_in), wide = dense(wide_in), x = dense(sum_in),
                     dsum = dsum_in.defined() ? dense(dsum_in.to(x.scalar_type())) : dsum_in, w = dense(weight);
    const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
    NormGradients result{at::empty_like(x), need_dw ? at::empty_like(w) : at::Tensor()};
    const at::ScalarType from = dy.defined() ? dy.scalar_type() : x.scalar_type();
    norm_types(x, w, from, packs(width, {x, w, dy, wide, dsum}), [&](auto tx, auto tw, auto ty, auto v) {
      using TX = decltype(tx);
      using TY = decltype(ty);
      Run::rows(
          RmsNormBackward<TX, decltype(tw), TY, v()>{in<TY>(dy), in<float>(wide), in<TX>(dsum), in<TX>(x),
                                                     in<decltype(tw)>(w), in<float>(rstd), out<TX>(result.dx), width},
          rows);
      if (!need_dw) return;
      const int64_t chunks = (rows + kNormRows - 1) / kNormRows;
      const at::Tensor partial = at::empty({chunks, width}, x.options().dtype(at::kFloat));
      Run::threads(RmsNormWeightPartial<TX, TY>{in<TY>(dy), in<float>(wide), in<TX>(x), in<float>(rstd),
                                                out<float>(partial), rows, width},
                   chunks * width);
      Run::threads(SumChunks<decltype(tw)>{in<float>(partial), chunks, width, out<decltype(tw)>(result.dw)}, width);
    });
    return result;
  }

  static at::Tensor rotary(const at::Tensor& x_in, const at::Tensor& cos_in, const at::Tensor& sin_in, double sign) {
    const int64_t tokens = x_in.size(0), heads = x_in.size(1), width = x_in.size(2);
    const at::Tensor x = width == 0 || (x_in.stride(2) == 1 && x_in.stride(1) == width) ? x_in : x_in.contiguous();
    const at::Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
    MOEGRAFT_INVARIANT(
        width % 2 == 0 && cos.size(0) == tokens && cos.size(1) * 2 == width && cos.scalar_type() == at::kFloat,
        "rotary: x ", x.sizes(), ", cos ", cos.sizes());
    const at::Tensor y = at::empty({tokens, heads, width}, x.options());
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width / 2, {x, cos, sin, y}), [&](auto v) {
        Run::threads(
            Rotate<T, v()>{in<T>(x), x.stride(0), in<float>(cos), in<float>(sin), out<T>(y), heads, width, float(sign)},
            tokens * heads * (width / 2 / v()));
      });
    });
    return y;
  }

  static Route route_forward(const at::Tensor& logits_in, int64_t top_k, bool renormalise) {
    const at::Tensor logits = logits_in.contiguous();
    const int64_t tokens = logits.size(0), experts = logits.size(1);
    MOEGRAFT_INVARIANT(logits.scalar_type() == at::kFloat && top_k >= 1 && top_k <= experts, "route: logits ",
                       logits.sizes(), ", top ", top_k);
    Route r{at::empty_like(logits), at::empty({tokens, top_k}, logits.options().dtype(at::kLong)),
            at::empty({tokens, top_k}, logits.options())};
    Run::rows(RouteForward{in<float>(logits), out<float>(r.probs_TE), out<int64_t>(r.topk_ids_TK),
                           out<float>(r.topk_weights_TK), experts, top_k, renormalise},
              tokens);
    return r;
  }
  static at::Tensor route_backward(const Route& r, const at::Tensor& dweights_in, const at::Tensor& dprobs_in,
                                   bool renormalise) {
    const at::Tensor dweights = dweights_in.defined() ? dweights_in.contiguous() : dweights_in,
                     dprobs = dprobs_in.defined() ? dprobs_in.contiguous() : dprobs_in;
    const at::Tensor dlogits = at::empty_like(r.probs_TE);
    Run::rows(RouteBackward{in<float>(r.probs_TE), in<int64_t>(r.topk_ids_TK), in<float>(r.topk_weights_TK),
                            in<float>(dweights), in<float>(dprobs), out<float>(dlogits), r.probs_TE.size(1),
                            r.topk_ids_TK.size(1), renormalise},
              r.probs_TE.size(0));
    return dlogits;
  }

  static void add_routing_sums(const at::Tensor& sums, const at::Tensor& probs_in, const at::Tensor& ids_in,
                               const at::Tensor& modality_in) {
    const at::Tensor probs = probs_in.contiguous(), ids = ids_in.contiguous(),
                     modality = modality_in.defined() ? modality_in.contiguous() : modality_in;
    const int64_t tokens = probs.size(0), experts = probs.size(1),
                  chunks = (tokens + kRoutingTokens - 1) / kRoutingTokens;
    MOEGRAFT_INVARIANT(sums.is_contiguous() && sums.size(1) == 2 * experts + 3 && probs.scalar_type() == at::kFloat,
                       "routing sums: ", sums.sizes(), ", probabilities ", probs.sizes());
    const at::Tensor partial = at::empty({chunks, sums.size(0), sums.size(1)}, probs.options());
    Run::rows(
        RoutingPartial{in<float>(probs), in<int64_t>(ids), in<int64_t>(modality), out<float>(partial), tokens, experts,
                       ids.size(1), sums.size(0), experts > 1 ? float(1.0 / std::log(double(experts))) : 1.0f},
        chunks);
    Run::threads(AddRoutingPartials{in<float>(partial), out<double>(sums), chunks, sums.numel()}, sums.numel());
  }

  static Dispatch make_dispatch(const at::Tensor& ids_in, int64_t num_experts, const at::Tensor& group_in,
                                int64_t num_groups, int64_t num_rows = -1) {
    const at::Tensor ids = ids_in.contiguous(),
                     group = group_in.defined() ? group_in.to(at::kLong).contiguous() : group_in;
    const int64_t slots = ids.numel(), rows = num_rows < 0 ? slots : num_rows, top_k = ids.size(1),
                  buckets = num_experts * num_groups,
                  chunks = std::max<int64_t>(1, (slots + kSortChunk - 1) / kSortChunk);
    MOEGRAFT_INVARIANT(slots < (int64_t{1} << 31), "dispatch: ", slots, " rows do not fit 32 bits");
    MOEGRAFT_INVARIANT(buckets >= 1 && (num_groups == 1 || group.defined()), "dispatch: ", num_experts, " experts, ",
                       num_groups, " groups");
    const auto int32 = ids.options().dtype(at::kInt);
    Dispatch d;
    d.num_experts = num_experts;
    d.num_groups = num_groups;
    d.top_k = top_k;
    d.token_of_row_R = at::empty({rows}, int32);
    d.row_of_slot_TK = at::empty(ids.sizes(), int32);
    d.offsets = at::empty({buckets + 1}, int32);
    const at::Tensor bucket = at::empty({slots}, int32), counts = at::zeros({(buckets + 1) * chunks}, int32);
    Run::threads(CountSlots{in<int64_t>(ids), num_groups > 1 ? in<int64_t>(group) : nullptr, top_k, num_experts,
                            num_groups, chunks, out<int32_t>(bucket), out<int32_t>(counts)},
                 slots);
    const at::Tensor ends = at::cumsum(counts, 0, at::kInt);
    Run::threads(BucketOffsets{in<int32_t>(ends), chunks, out<int32_t>(d.offsets)}, buckets + 1);
    Run::threads(PlaceSlots{in<int32_t>(bucket), in<int32_t>(counts), in<int32_t>(ends), top_k, chunks, buckets,
                            out<int32_t>(d.token_of_row_R), out<int32_t>(d.row_of_slot_TK)},
                 slots);
    return d;
  }

  static at::Tensor gather_rows(const at::Tensor& x_in, const at::Tensor& token_of_row) {
    const at::Tensor x = x_in.contiguous(), y = at::empty({token_of_row.size(0), x.size(1)}, x.options());
    const int64_t width = x.size(1);
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {x, y}), [&](auto v) {
        Run::threads(GatherRows<T, v()>{in<T>(x), in<int32_t>(token_of_row), out<T>(y), width},
                     token_of_row.size(0) * (width / v()));
      });
    });
    return y;
  }

  static void add_rows(const at::Tensor& from_in, const at::Tensor& rows_in, const at::Tensor& to,
                       double factor = 1.0) {
    const at::Tensor from = from_in.contiguous(), rows = rows_in.contiguous();
    const int64_t width = to.size(1);
    MOEGRAFT_INVARIANT(to.is_contiguous() && from.scalar_type() == to.scalar_type() && from.size(1) == width &&
                           from.size(0) == rows.size(0),
                       "add_rows: ", from.sizes(), " to ", to.sizes());
    with_type(to.scalar_type(), [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {from, to}), [&](auto v) {
        Run::threads(AddRows<T, v()>{in<T>(from), in<int64_t>(rows), out<T>(to), width, float(factor)},
                     rows.size(0) * (width / v()));
      });
    });
  }

  // y + y2 + delta on the rows whose bits meet `acting`; y2, delta, weights may be undefined. All contiguous.
  static at::Tensor combine_sum(const at::Tensor& y, const at::Tensor& y2, const at::Tensor& delta,
                                const at::Tensor& row_bits, uint32_t acting, const at::Tensor& weights,
                                const at::Tensor& row_of_slot) {
    const int64_t tokens = row_of_slot.size(0), width = y.size(1);
    const at::Tensor sum = at::empty({tokens, width}, y.options());
    with_type(y.scalar_type(), [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {y, y2, delta, sum}), [&](auto v) {
        Run::threads(CombineRows<T, v()>{in<T>(y), in<T>(y2), in<T>(delta), bits(row_bits), acting, in<float>(weights),
                                         in<int32_t>(row_of_slot), out<T>(sum), width, row_of_slot.size(1)},
                     tokens * (width / v()));
      });
    });
    return sum;
  }
  static at::Tensor combine(const at::Tensor& y, const at::Tensor& weights, const at::Tensor& row_of_slot) {
    return combine_sum(y.contiguous(), {}, {}, {}, 0, weights.defined() ? weights.contiguous() : weights, row_of_slot);
  }

  // Bits per row, stored as int32.
  static const uint32_t* bits(const at::Tensor& row_bits) {
    return reinterpret_cast<const uint32_t*>(in<int32_t>(row_bits));
  }

  static at::Tensor swiglu_forward(const at::Tensor& g_in, const at::Tensor& u_in) {
    const at::Tensor g = g_in.contiguous(), u = u_in.contiguous(), h = at::empty_like(g);
    const int64_t width = g.size(-1), rows = width ? g.numel() / width : 0;
    with_type(g.scalar_type(), [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {g, u, h}), [&](auto v) {
        Run::threads(SwigluForward<T, v()>{out<T>(g), out<T>(u), width, width, nullptr, nullptr, 0, nullptr, 0, 0,
                                           out<T>(h), width},
                     rows * (width / v()));
      });
    });
    return h;
  }
  static std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& dh_in, const at::Tensor& g_in,
                                                           const at::Tensor& u_in) {
    const at::Tensor dh = dh_in.contiguous(), g = g_in.contiguous(), u = u_in.contiguous(), dg = at::empty_like(g),
                     du = at::empty_like(u);
    const int64_t width = g.size(-1), rows = width ? g.numel() / width : 0;
    with_type(g.scalar_type(), [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {dh, g, u, dg, du}), [&](auto v) {
        Run::rows(SwigluBackward<T, v()>{in<T>(dh), nullptr, nullptr, 0, in<T>(g), in<T>(u), width, width, nullptr,
                                         out<T>(dg), out<T>(du), width, nullptr, nullptr, width},
                  rows);
      });
    });
    return {dg, du};
  }

  static at::Tensor cross_entropy_rows(const at::Tensor& logits, const at::Tensor& targets_in, double scale,
                                       const at::Tensor& d) {
    const at::Tensor targets = targets_in.contiguous();
    MOEGRAFT_INVARIANT(logits.dim() == 2 && logits.is_contiguous() && targets.size(0) == logits.size(0),
                       "cross_entropy_rows: logits ", logits.sizes());
    MOEGRAFT_INVARIANT(!d.defined() || (d.is_contiguous() && d.sizes() == logits.sizes() &&
                                        (d.scalar_type() == logits.scalar_type() || !d.is_alias_of(logits))),
                       "cross_entropy_rows: gradient");
    const auto at_pack = [](const at::Tensor& t) {
      return !t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    };
    MOEGRAFT_INVARIANT(at_pack(logits) && at_pack(d), "cross_entropy_rows: logits or gradient start off 16 bytes");
    const at::Tensor nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
    with_type(logits.scalar_type(), [&](auto t) {
      using TIn = decltype(t);
      with_type(d.defined() ? d.scalar_type() : logits.scalar_type(), [&](auto to) {
        using TOut = decltype(to);
        Run::rows(CrossEntropyRow<TIn, TOut>{in<TIn>(logits), in<int64_t>(targets), out<TOut>(d), out<float>(nll),
                                             logits.size(1), float(scale)},
                  logits.size(0));
      });
    });
    return nll;
  }

 private:
  // x bf16 implies y bf16.
  template <class F>
  static void norm_types(const at::Tensor& x, const at::Tensor& w, at::ScalarType y, bool packed, const F& f) {
    with_pack(packed, [&](auto v) {
      with_type(w.scalar_type(), [&](auto tw) {
        if (x.scalar_type() == at::kBFloat16) return f(bf16{}, tw, bf16{}, v);
        MOEGRAFT_INVARIANT(x.scalar_type() == at::kFloat, "rms_norm takes float32 and bfloat16, got ",
                           c10::toString(x.scalar_type()));
        with_type(y, [&](auto ty) { f(float{}, tw, ty, v); });
      });
    });
  }
};

}  // namespace moegraft::kernels::cuda
