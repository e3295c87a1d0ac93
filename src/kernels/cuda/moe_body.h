#pragma once
// The expert FFN on rows in expert order, for any way to run a functor: the device (moe.cpp), or the host in tests.
// Full products and thin ones are at::_grouped_mm with the experts' row ranges as device offsets; the rest is ours. One
// product covers all rows of an expert, whatever acts on them, so that adapters never change how the base's products
// are cut; a term that does not act on a row adds nothing there, not even a zero.

#include "../factor_cache.h"
#include "../moe.h"
#include "ops_body.h"
#include "stack.h"

namespace moegraft::kernels::cuda {

// A copy of the whole layer where there is no such view: join_experts (expert_layout.h) lays a base out once so that
// this never happens.
inline at::Tensor stacked(const ExpertMatrices& matrices) {
  return matrices.stacked().defined() ? matrices.stacked() : at::stack(matrices.list());
}

// The low-rank terms of one site side by side: columns [begin, begin + P) of the site's thin products belong to a term;
// ranks are padded with zero columns to multiples of 8, which the grouped product's alignment asks for.
struct ThinSite {
  const std::vector<ExpertLowRank>* terms = nullptr;
  int64_t columns = 0;  // padded, of all terms
  std::vector<int64_t> begin;
  uint32_t first_bit = 0, acting = 0;  // term i is bit first_bit + i

  bool empty() const { return columns == 0; }
  uint32_t bit(size_t term) const { return uint32_t{1} << (first_bit + term); }
  static int64_t padded(int64_t rank) { return (rank + 7) / 8 * 8; }
};

template <class Run>
class MoeLayer {
 public:
  using Op = Ops<Run>;

  explicit MoeLayer(const MoeProblem& problem) : p_(problem), d_(problem.dispatch), type_(problem.x_XD.scalar_type()) {
    gate_ = stacked(p_.weights.gate_FD);
    up_ = stacked(p_.weights.up_FD);
    down_ = stacked(p_.weights.down_DF);
    gate_up_ = joined_view(gate_, up_);
    const int64_t E = d_.num_experts, G = d_.num_groups;
    ends_ = d_.offsets.slice(0, G, E * G + 1, G).contiguous();
    uint32_t bit = 0;
    for (int s = 0; s < kSites; ++s) {
      ThinSite& site = sites_[s];
      site.terms = &p_.terms[s];
      site.first_bit = bit;
      for (const ExpertLowRank& term : p_.terms[s]) {
        site.acting |= uint32_t{1} << bit++;
        site.begin.push_back(site.columns);
        site.columns += ThinSite::padded(term.A_EPX.size(1));
      }
    }
    MOEGRAFT_INVARIANT(bit <= kMaxTerms && G <= kMaxGroups, "device experts: ", bit, " terms, ", G, " groups");
    if (bit > 0) row_bits_ = make_row_bits();
    if (bit > 0 && p_.cache) kept_ = &p_.cache->content<Kept>(p_, [] { return std::make_unique<Kept>(); });
  }

  MoeForward forward(bool save, bool keep_hidden) const {
    MoeForward result;
    const int64_t R = d_.num_rows(), F = p_.expert_width();
    if (R == 0) {
      result.out_XD = at::zeros({d_.row_of_slot_TK.size(0), p_.model_width()}, p_.x_XD.options());
      if (keep_hidden) result.hidden_RF = at::empty({0, F}, p_.x_XD.options());
      return result;
    }
    const ThinSite &sg = sites_[kGate], &su = sites_[kUp], &sd = sites_[kDown];
    at::Tensor x = Op::gather_rows(p_.x_XD, d_.token_of_row_R), g, u, thin_in, thin_down;
    if (gate_up_.defined()) {
      const at::Tensor both = product(x, gate_up_.transpose(1, 2));
      g = both.narrow(1, 0, F);
      u = both.narrow(1, F, F);
    } else {
      g = product(x, gate_.transpose(1, 2));
      u = product(x, up_.transpose(1, 2));
    }
    at::Tensor delta_g, delta_u;
    if (!sg.empty() || !su.empty()) {
      thin_in = product(x, kept(kKeptIn, [&] { return pack_A_in(); }).transpose(1, 2));
      gate_thin(sg, thin_in, 0, thin_in, 0, {});
      gate_thin(su, thin_in, sg.columns, thin_in, sg.columns, {});
      if (!sg.empty())
        delta_g =
            product(thin_in.narrow(1, 0, sg.columns), kept(kKeptGate, [&] { return pack_B(sg); }).transpose(1, 2));
      if (!su.empty())
        delta_u = product(thin_in.narrow(1, sg.columns, su.columns),
                          kept(kKeptUp, [&] { return pack_B(su); }).transpose(1, 2));
    }
    x = at::Tensor();
    const at::Tensor h = at::empty({R, F}, p_.x_XD.options());
    swiglu(g, u, delta_g, delta_u, h);
    delta_g = delta_u = at::Tensor();
    const at::Tensor y = product(h, down_.transpose(1, 2));
    at::Tensor delta_y;
    if (!sd.empty()) {
      thin_down = product(h, kept(kKeptDownA, [&] { return pack_A(sd); }).transpose(1, 2));
      gate_thin(sd, thin_down, 0, thin_down, 0, {});
      delta_y = product(thin_down, kept(kKeptDownB, [&] { return pack_B(sd); }).transpose(1, 2));
    }
    result.out_XD = Op::combine_sum(y, {}, delta_y, row_bits_, sd.acting, p_.weights_XK, d_.row_of_slot_TK);
    if (keep_hidden) result.hidden_RF = h;
    if (save) {
      result.saved = {g, u};
      if (thin_in.defined()) result.saved.push_back(thin_in);
      if (thin_down.defined()) result.saved.push_back(thin_down);
    }
    return result;
  }

  MoeGradients backward(const std::vector<at::Tensor>& saved, const at::Tensor& dout_XD, const MoeNeeds& needs) const {
    MoeGradients grads;
    for (int s = 0; s < kSites; ++s) grads.factors[s].resize(p_.terms[s].size());
    const int64_t R = d_.num_rows(), F = p_.expert_width();
    MOEGRAFT_INVARIANT(!needs.experts, "device experts are frozen");
    if (R == 0) return empty_gradients(std::move(grads), needs);
    const ThinSite &sg = sites_[kGate], &su = sites_[kUp], &sd = sites_[kDown];
    const bool thin_in = !sg.empty() || !su.empty(), want_down = any(needs, kDown),
               want_in = any(needs, kGate) || any(needs, kUp);
    const at::Tensor &g = saved.at(0), &u = saved.at(1), t_in = thin_in ? saved.at(2) : at::Tensor(),
                     t_down = sd.empty() ? at::Tensor() : saved.at(thin_in ? 3 : 2);

    const at::Tensor row_weights = at::empty({R}, p_.weights_XK.options());
    Run::threads(SlotsToRows{in<float>(p_.weights_XK), in<int32_t>(d_.row_of_slot_TK), out<float>(row_weights)},
                 p_.weights_XK.numel());

    // Through down. dout's rows are not weighted: the weight enters with silu's derivative, and <h, dh> before it is
    // the weight's own gradient.
    at::Tensor dy = Op::gather_rows(dout_XD, d_.token_of_row_R), dh = product(dy, down_), delta_h, dt_down, dt_weighted,
               t_weighted;
    if (!sd.empty()) {
      dt_down = product(dy, pack_B(sd));
      dt_weighted = at::empty_like(dt_down);
      gate_thin(sd, dt_down, 0, dt_down, 0, row_weights, dt_weighted);
      delta_h = product(dt_down, pack_A(sd));
      if (want_down) {
        t_weighted = at::empty_like(t_down);
        gate_thin(sd, t_down, 0, {}, 0, row_weights, t_weighted);
      }
    }
    const at::Tensor dgu = at::empty({R, 2 * F}, g.options()), dg = dgu.narrow(1, 0, F), du = dgu.narrow(1, F, F);
    at::Tensor h = want_down ? at::empty({R, F}, g.options()) : at::Tensor(),
               dots = needs.weights ? at::empty_like(row_weights) : at::Tensor();
    swiglu_backward(dh, delta_h, g, u, row_weights, dg, du, h, dots);
    dh = delta_h = at::Tensor();
    if (needs.weights) {
      grads.weights_XK = at::empty_like(p_.weights_XK);
      Run::threads(RowsToSlots{in<float>(dots), in<int32_t>(d_.row_of_slot_TK), out<float>(grads.weights_XK)},
                   p_.weights_XK.numel());
    }
    if (want_down)
      factor_gradients(sd, needs.factors[kDown], contraction(dt_weighted, h), contraction(dy, t_weighted),
                       grads.factors[kDown]);
    dy = h = dt_down = dt_weighted = t_weighted = at::Tensor();

    // Through gate and up.
    at::Tensor dt_in, delta_x;
    if (thin_in) {
      dt_in = at::empty({R, sg.columns + su.columns}, g.options());
      if (!sg.empty()) gate_thin(sg, product(dg, pack_B(sg)), 0, dt_in, 0, {});
      if (!su.empty()) gate_thin(su, product(du, pack_B(su)), 0, dt_in, sg.columns, {});
      if (needs.x) delta_x = product(dt_in, pack_A_in());
    }
    if (want_in) {
      const at::Tensor x = Op::gather_rows(p_.x_XD, d_.token_of_row_R),
                       dA = contraction(dt_in, x);  // [E, all columns, D]
      if (!sg.empty())
        factor_gradients(sg, needs.factors[kGate], dA.narrow(1, 0, sg.columns),
                         contraction(dg, t_in.narrow(1, 0, sg.columns)), grads.factors[kGate]);
      if (!su.empty())
        factor_gradients(su, needs.factors[kUp], dA.narrow(1, sg.columns, su.columns),
                         contraction(du, t_in.narrow(1, sg.columns, su.columns)), grads.factors[kUp]);
    }
    if (needs.x) {
      const at::Tensor dx = gate_up_.defined() ? product(dgu, gate_up_) : product(dg, gate_),
                       dx_up = gate_up_.defined() ? at::Tensor() : product(du, up_);
      grads.x_XD = Op::combine_sum(dx, dx_up, delta_x, row_bits_, sg.acting | su.acting, {}, d_.row_of_slot_TK);
    }
    return grads;
  }

 private:
  // Factors of the forward pass as a FactorCache keeps them.
  enum { kKeptIn, kKeptGate, kKeptUp, kKeptDownA, kKeptDownB, kKeptCount };
  struct Kept {
    std::array<at::Tensor, kKeptCount> tensors;
  };
  template <class Make>
  at::Tensor kept(int which, const Make& make) const {
    if (!kept_) return make();
    at::Tensor& tensor = kept_->tensors[size_t(which)];
    if (!tensor.defined()) tensor = make();
    return tensor;
  }

  // [R, a] x [E, a, b] -> [R, b], each expert's rows with its own matrix.
  at::Tensor product(const at::Tensor& rows, const at::Tensor& matrices) const {
    return at::_grouped_mm(aligned(rows), aligned(matrices), ends_);
  }
  // [R, a], [R, b] -> [E, a, b], contracted over each expert's rows.
  at::Tensor contraction(const at::Tensor& left, const at::Tensor& right) const {
    return at::_grouped_mm(aligned(left).t(), aligned(right), ends_);
  }
  // What the device's tensor copies ask for and a host would forgive.
  static const at::Tensor& aligned(const at::Tensor& t) {
    MOEGRAFT_INVARIANT(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, "device experts: an operand ",
                       t.sizes(), " of a grouped product starts off 16 bytes");
    return t;
  }

  at::Tensor make_row_bits() const {
    RowBits f{in<int32_t>(d_.offsets), int32_t(d_.num_experts * d_.num_groups), int32_t(d_.num_groups), {}, nullptr};
    for (int s = 0; s < kSites; ++s)
      for (size_t i = 0; i < p_.terms[s].size(); ++i)
        for (int64_t group = 0; group < d_.num_groups; ++group)
          if (p_.terms[s][i].acts[group]) f.bits_of_group[group] |= sites_[s].bit(i);
    const at::Tensor bits = at::empty({d_.num_rows()}, d_.offsets.options());
    f.row_bits = reinterpret_cast<uint32_t*>(out<int32_t>(bits));
    Run::threads(f, d_.num_rows());
    return bits;
  }

  // A of one site's terms in the compute dtype, [E, columns, X].
  at::Tensor pack_A(const ThinSite& site) const {
    const at::Tensor A = padded({d_.num_experts, site.columns, site.terms->front().A_EPX.size(2)}, {&site});
    write_A(site, A, 0);
    return A;
  }
  at::Tensor pack_A_in() const {
    const ThinSite &sg = sites_[kGate], &su = sites_[kUp];
    const at::Tensor A = padded({d_.num_experts, sg.columns + su.columns, p_.model_width()}, {&sg, &su});
    write_A(sg, A, 0);
    write_A(su, A, sg.columns);
    return A;
  }
  void write_A(const ThinSite& site, const at::Tensor& to, int64_t column) const {
    for (size_t i = 0; i < site.terms->size(); ++i) {
      const at::Tensor& A = (*site.terms)[i].A_EPX;
      to.narrow(1, column + site.begin[i], A.size(1)).copy_(A);
    }
  }
  // scale * B in the compute dtype, [E, X, columns]: one rounding of the scaled master.
  at::Tensor pack_B(const ThinSite& site) const {
    const at::Tensor B = padded({d_.num_experts, site.terms->front().B_EXP.size(1), site.columns}, {&site});
    for (size_t i = 0; i < site.terms->size(); ++i) {
      const ExpertLowRank& term = (*site.terms)[i];
      at::Tensor to = B.narrow(2, site.begin[i], term.B_EXP.size(2));
      at::mul_out(to, term.B_EXP, at::scalar_tensor(term.scale, at::TensorOptions(at::kDouble)));
    }
    return B;
  }
  // For the factors of these sites; zeros only where a rank is padded.
  at::Tensor padded(at::IntArrayRef shape, std::initializer_list<const ThinSite*> sites) const {
    int64_t padding = 0;
    for (const ThinSite* site : sites) {
      padding += site->columns;
      for (const ExpertLowRank& term : *site->terms) padding -= term.A_EPX.size(1);
    }
    return padding == 0 ? at::empty(shape, p_.x_XD.options()) : at::zeros(shape, p_.x_XD.options());
  }

  // A site's thin product from columns [from_column, ...) to columns [to_column, ...), exactly zero on rows where a
  // term does not act; `weighted` (as wide as `to`) gets it times the rows' weights. Either may be undefined.
  void gate_thin(const ThinSite& site, const at::Tensor& from, int64_t from_column, const at::Tensor& to,
                 int64_t to_column, const at::Tensor& row_weights, const at::Tensor& weighted = {}) const {
    with_type(type_, [&](auto t) {
      using T = decltype(t);
      for (size_t i = 0; i < site.terms->size(); ++i) {
        const int64_t columns = ThinSite::padded((*site.terms)[i].A_EPX.size(1)), at = to_column + site.begin[i];
        const auto place = [&](const at::Tensor& tensor) { return tensor.defined() ? out<T>(tensor) + at : nullptr; };
        Run::threads(GateThin<T>{in<T>(from) + from_column + site.begin[i], from.stride(0), place(to), place(weighted),
                                 (to.defined() ? to : weighted).stride(0), Op::bits(row_bits_), site.bit(i),
                                 in<float>(row_weights), columns},
                     d_.num_rows() * columns);
      }
    });
  }

  void swiglu(const at::Tensor& g, const at::Tensor& u, const at::Tensor& delta_g, const at::Tensor& delta_u,
              const at::Tensor& h) const {
    const int64_t width = h.size(1);
    with_type(type_, [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {g, u, delta_g, delta_u, h}), [&](auto v) {
        Run::threads(
            SwigluForward<T, v()>{out<T>(g), out<T>(u), g.stride(0), u.stride(0), in<T>(delta_g), in<T>(delta_u), width,
                                  Op::bits(row_bits_), sites_[kGate].acting, sites_[kUp].acting, out<T>(h), width},
            d_.num_rows() * (width / v()));
      });
    });
  }
  void swiglu_backward(const at::Tensor& dh, const at::Tensor& delta, const at::Tensor& g, const at::Tensor& u,
                       const at::Tensor& row_weights, const at::Tensor& dg, const at::Tensor& du, const at::Tensor& h,
                       const at::Tensor& dots) const {
    const int64_t width = dg.size(1);
    with_type(type_, [&](auto t) {
      using T = decltype(t);
      with_pack(packs(width, {dh, delta, g, u, dg, du, h}), [&](auto v) {
        Run::rows(SwigluBackward<T, v()>{in<T>(dh), in<T>(delta), Op::bits(row_bits_), sites_[kDown].acting, in<T>(g),
                                         in<T>(u), g.stride(0), u.stride(0), in<float>(row_weights), out<T>(dg),
                                         out<T>(du), dg.stride(0), out<T>(h), out<float>(dots), width},
                  d_.num_rows());
      });
    });
  }

  // dA [E, columns, X] (scaled already: B was) and dB [E, X, columns] (not scaled) of a site -> each term's gradients
  // in its factors' dtype.
  void factor_gradients(const ThinSite& site, const std::vector<bool>& needed, const at::Tensor& dA,
                        const at::Tensor& dB, std::vector<std::pair<at::Tensor, at::Tensor>>& to) const {
    for (size_t i = 0; i < site.terms->size(); ++i) {
      if (i >= needed.size() || !needed[i]) continue;
      const ExpertLowRank& term = (*site.terms)[i];
      to[i] = {factor_gradient(dA.narrow(1, site.begin[i], term.A_EPX.size(1)), term.A_EPX, 1.0),
               factor_gradient(dB.narrow(2, site.begin[i], term.B_EXP.size(2)), term.B_EXP, term.scale)};
    }
  }
  at::Tensor factor_gradient(const at::Tensor& from, const at::Tensor& factor, double scale) const {
    const at::Tensor to = at::empty(factor.sizes(), factor.options());
    with_type(type_, [&](auto t) {
      using TFrom = std::decay_t<decltype(t)>;
      with_type(factor.scalar_type(), [&](auto master) {
        using TTo = std::decay_t<decltype(master)>;
        if constexpr (!(std::is_same_v<TFrom, float> &&
                        std::is_same_v<TTo, bf16>)) {  // factors are masters or of the compute dtype, never below it
          const auto run = [&](auto f, int64_t width) { Run::threads(f, to.numel() / width); };
          const int64_t m = to.size(1), n = to.size(2), se = from.stride(0), sm = from.stride(1),
                        groups = d_.num_groups;
          const int32_t* offsets = in<int32_t>(d_.offsets);
          if (packs(n, {from, to}))
            run(FactorGradient<TFrom, TTo, 8>{in<TFrom>(from), se, sm, out<TTo>(to), m, n, groups, offsets,
                                              float(scale)},
                8);
          else
            run(FactorGradient<TFrom, TTo, 1>{in<TFrom>(from), se, sm, out<TTo>(to), m, n, groups, offsets,
                                              float(scale)},
                1);
        }
      });
    });
    return to;
  }

  static bool any(const MoeNeeds& needs, int site) {
    return std::find(needs.factors[site].begin(), needs.factors[site].end(), true) != needs.factors[site].end();
  }

  MoeGradients empty_gradients(MoeGradients grads, const MoeNeeds& needs) const {
    if (needs.x) grads.x_XD = at::zeros_like(p_.x_XD);
    if (needs.weights) grads.weights_XK = at::zeros_like(p_.weights_XK);
    for (int s = 0; s < kSites; ++s)
      for (size_t i = 0; i < needs.factors[s].size(); ++i)
        if (needs.factors[s][i])
          grads.factors[s][i] = {at::zeros(p_.terms[s][i].A_EPX.sizes(), p_.terms[s][i].A_EPX.options()),
                                 at::zeros(p_.terms[s][i].B_EXP.sizes(), p_.terms[s][i].B_EXP.options())};
    return grads;
  }

  const MoeProblem& p_;
  const Dispatch& d_;
  at::ScalarType type_;
  at::Tensor gate_, up_, down_, gate_up_;
  at::Tensor ends_;      // int32 [E]: where each expert's rows end
  at::Tensor row_bits_;  // int32 [R]: the terms that act on the row; undefined without terms
  std::array<ThinSite, kSites> sites_;
  Kept* kept_ = nullptr;
};

}  // namespace moegraft::kernels::cuda
