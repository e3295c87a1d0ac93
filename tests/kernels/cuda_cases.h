#pragma once
// What the host's and the device's tests of the device kernels share: inputs, and the plain definitions in double.

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "kernels/cuda/host_run.h"
#include "kernels/cuda/moe_body.h"
#include "libtorch.h"
#include "moegraft/base/rng.h"
#include "moegraft/kernels/expert_layout.h"
#include "moegraft/kernels/route.h"

namespace moegraft::kernels::cuda {

using Host = Ops<OnHost>;

inline at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  auto g = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::empty(shape, at::kDouble).normal_(0, 1, g).to(dtype);
}
inline at::Tensor wide(const at::Tensor& x) { return x.detach().to(at::kDouble).set_requires_grad(true); }
inline double distance(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return a.numel() == 0 ? 0 : (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}
inline double largest(const at::Tensor& x) { return x.numel() == 0 ? 0 : x.abs().max().item<double>(); }

struct Routing {
  int64_t T, E, K, groups;
  int kind;  // 0 random, 1 all tokens to the same experts, 2 the last expert empty, 3 some slots' experts elsewhere
};
inline const std::vector<Routing> kRoutings{{0, 4, 2, 2, 0},   {1, 2, 1, 1, 0},   {7, 4, 2, 2, 0},    {50, 8, 3, 2, 2},
                                            {30, 4, 4, 1, 1},  {600, 3, 1, 3, 1}, {300, 64, 8, 2, 0}, {256, 1, 1, 1, 0},
                                            {300, 8, 3, 2, 3}, {5, 2, 1, 1, 3}};

inline std::pair<at::Tensor, at::Tensor> make_routing(const Routing& c) {
  Rng rng(3, "route");
  const at::Tensor ids = at::empty({c.T, c.K}, at::kLong), group = at::empty({c.T}, at::kLong);
  for (int64_t t = 0; t < c.T; ++t) {
    const auto order = rng.permutation(c.kind == 2 ? c.E - 1 : c.E);
    for (int64_t k = 0; k < c.K; ++k)
      ids[t][k] = c.kind == 3 && (t % 4 == 0 || (t + k) % 3 == 0) ? -1 : c.kind == 1 ? k : int64_t(order[k]);
    group[t] = int64_t(rng.below(c.groups));
  }
  return {ids, group};
}

inline int64_t rows_of(const at::Tensor& ids) { return (ids >= 0).sum().item<int64_t>(); }

struct MoeCase {
  Routing routing;
  int64_t D, F, P;
};
inline const std::vector<MoeCase> kMoeCases{
    {{1, 2, 1, 1, 0}, 8, 8, 8},   {{7, 4, 2, 2, 0}, 16, 8, 3},    {{50, 8, 3, 2, 2}, 16, 24, 8},
    {{30, 4, 4, 1, 1}, 8, 16, 5}, {{600, 3, 1, 3, 1}, 16, 24, 2}, {{65, 5, 2, 2, 1}, 16, 8, 16},
    {{0, 3, 2, 2, 0}, 8, 8, 8},   {{70, 5, 3, 2, 3}, 16, 8, 3},   {{1, 4, 2, 1, 3}, 8, 8, 8}};

enum class Layout { stacked, joined, scattered };

struct MoeInputs {
  MoeProblem problem;
  std::vector<at::Tensor> leaves;  // x, weights, then (A, B) of each term
};

inline MoeInputs make_moe(const MoeCase& c, at::ScalarType dtype, at::ScalarType masters, Layout layout) {
  MoeInputs in;
  MoeProblem& p = in.problem;
  const Routing& r = c.routing;
  const auto leaf = [&](const at::Tensor& t) {
    in.leaves.push_back(t);
    return t;
  };
  p.x_XD = leaf(randn({r.T, c.D}, 1).to(at::kBFloat16).to(dtype));  // exact in every dtype of the table
  p.weights_XK = leaf(randn({r.T, r.K}, 2).to(dtype == at::kDouble ? at::kDouble : at::kFloat));
  const auto [ids, group] = make_routing(r);
  p.dispatch = Host::make_dispatch(ids, r.E, group, r.groups, rows_of(ids));
  const auto matrix = [&](int64_t rows, int64_t columns, uint64_t seed) {
    return (randn({r.E, rows, columns}, seed) * 0.5).to(at::kBFloat16).to(dtype);
  };
  at::Tensor gate = matrix(c.F, c.D, 4), up = matrix(c.F, c.D, 5), down = matrix(c.D, c.F, 6);
  if (layout == Layout::joined) {
    const at::Tensor both = at::cat({gate, up}, 1);
    gate = both.narrow(1, 0, c.F);
    up = both.narrow(1, c.F, c.F);
  }
  for (int64_t e = 0; e < r.E; ++e) {
    const auto place = [&](const at::Tensor& t) { return layout == Layout::scattered ? t[e].clone() : t[e]; };
    p.weights.gate_FD.push_back(place(gate));
    p.weights.up_FD.push_back(place(up));
    p.weights.down_DF.push_back(place(down));
  }
  const auto term = [&](int site, int64_t width_in, int64_t width_out, int64_t rank, uint64_t seed, bool all) {
    ExpertLowRank t{(randn({r.E, rank, width_in}, seed) * 0.5).to(at::kBFloat16).to(masters),
                    (randn({r.E, width_out, rank}, seed + 1) * 0.5).to(at::kBFloat16).to(masters),
                    1.5,
                    {}};
    for (int64_t g = 0; g < r.groups; ++g) t.acts.push_back(all || g == r.groups - 1);
    leaf(t.A_EPX);
    leaf(t.B_EXP);
    p.terms[site].push_back(std::move(t));
  };
  term(kGate, c.D, c.F, c.P, 7, false);
  term(kUp, c.D, c.F, c.P, 9, false);
  term(kUp, c.D, c.F, c.P + 1, 11, true);
  term(kDown, c.F, c.D, c.P, 13, false);
  return in;
}

// The definition, token by row, in the dtype of its inputs.
inline at::Tensor plain_moe(const MoeInputs& in, const std::vector<at::Tensor>& leaves) {
  const MoeProblem& p = in.problem;
  const Dispatch& d = p.dispatch;
  const auto dtype = p.x_XD.scalar_type();
  const at::Tensor x_RD = leaves[0].index_select(0, d.token_of_row_R);
  std::vector<at::Tensor> parts{at::empty({0, p.model_width()}, p.x_XD.options())};
  for (int64_t e = 0; e < d.num_experts; ++e)
    for (int64_t g = 0; g < d.num_groups; ++g) {
      const int64_t begin = d.offsets[e * d.num_groups + g].item<int>(),
                    count = d.offsets[e * d.num_groups + g + 1].item<int>() - begin;
      const auto project = [&](int site, const at::Tensor& x, const at::Tensor& w) {
        at::Tensor y = at::matmul(x, w.t());
        size_t leaf = 2;
        for (int s = 0; s < kSites; ++s)
          for (const ExpertLowRank& t : p.terms[s]) {
            if (s == site && t.acts[g])
              y = y +
                  t.scale * at::matmul(at::matmul(x, leaves[leaf][e].to(dtype).t()), leaves[leaf + 1][e].to(dtype).t());
            leaf += 2;
          }
        return y;
      };
      const at::Tensor x = x_RD.narrow(0, begin, count);
      const at::Tensor h = at::silu(project(kGate, x, p.weights.gate_FD[e])) * project(kUp, x, p.weights.up_FD[e]);
      parts.push_back(project(kDown, h, p.weights.down_DF[e]));
    }
  parts.push_back(at::zeros({1, p.model_width()}, p.x_XD.options()));  // the row of slots without one
  const at::Tensor flat = d.row_of_slot_TK.view({-1});
  const at::Tensor y = at::cat(parts, 0)
                           .index_select(0, flat.masked_fill(flat < 0, d.num_rows()))
                           .view({d.row_of_slot_TK.size(0), d.top_k, p.model_width()});
  return (y * leaves[1].unsqueeze(-1)).sum(1);
}

inline MoeNeeds all_needs(const MoeProblem& p) {
  MoeNeeds needs;
  needs.x = needs.weights = true;
  for (int s = 0; s < kSites; ++s) needs.factors[s].assign(p.terms[s].size(), true);
  return needs;
}
// In the order of MoeInputs::leaves.
inline std::vector<at::Tensor> flat(const MoeGradients& g) {
  std::vector<at::Tensor> out{g.x_XD, g.weights_XK};
  for (const auto& site : g.factors)
    for (const auto& [A, B] : site) out.insert(out.end(), {A, B});
  return out;
}
inline std::vector<at::Tensor> exact_gradients(const MoeInputs& in, const at::Tensor& dout, at::Tensor& y) {
  std::vector<at::Tensor> leaves;
  for (const auto& leaf : in.leaves) leaves.push_back(leaf.detach().clone().set_requires_grad(true));
  y = plain_moe(in, leaves);
  return torch::autograd::grad({y}, leaves, {dout.to(y.scalar_type())}, {}, false, /*allow_unused=*/true);
}

// ------------------------------------------------------------------------------------------------ as the decoder calls
// them

// Every public operation with its gradients, on one device: results as float64 on the CPU.
using Named = std::vector<std::pair<std::string, at::Tensor>>;
inline Named public_ops(const at::Device& device, at::ScalarType dtype) {
  Named out;
  const auto on = [&](const at::Tensor& t) { return t.to(device); };
  const auto leaf = [&](at::IntArrayRef shape, uint64_t seed, at::ScalarType type) {
    return on(randn(shape, seed).to(at::kBFloat16).to(type)).set_requires_grad(true);
  };
  const auto keep = [&](const std::string& name, const std::vector<at::Tensor>& results,
                        const std::vector<at::Tensor>& leaves) {
    at::Tensor loss;
    for (size_t i = 0; i < results.size(); ++i) {
      out.emplace_back(name + " result " + std::to_string(i), results[i].detach().to(at::kCPU, at::kDouble));
      const at::Tensor part = (results[i].to(at::kFloat) * on(randn(results[i].sizes(), 90 + i))).sum();
      loss = loss.defined() ? loss + part : part;
    }
    const auto grads = torch::autograd::grad({loss}, leaves);
    for (size_t i = 0; i < grads.size(); ++i)
      out.emplace_back(name + " gradient " + std::to_string(i), grads[i].to(at::kCPU, at::kDouble));
  };
  const int64_t T = 40, D = 64;
  const at::Tensor x = leaf({T, D}, 1, at::kFloat), delta = leaf({T, D}, 2, dtype), w = leaf({D}, 3, at::kFloat),
                   low = leaf({T, D}, 4, dtype), w_low = leaf({D}, 5, dtype);
  const ResidualNorm n = residual_norm(x, delta, w, 1e-5, dtype, true);
  keep("residual_norm", {n.x_XD, n.y_XD, n.y_float_XD}, {x, delta, w});
  keep("residual_norm alone", {residual_norm(x, {}, w, 1e-5, dtype).y_XD}, {x, w});
  keep("rms_norm", {rms_norm(low.view({T, 4, 16}), w_low.narrow(0, 0, 16), 1e-5)}, {low, w_low});
  const at::Tensor angle = randn({T, 8}, 6);
  keep("rotary", {kernels::rotary(low.view({T, 4, 16}), on(angle.cos()), on(angle.sin()))}, {low});
  const at::Tensor logits = leaf({T, 16}, 7, at::kFloat);
  const Route r = kernels::route(logits, 4, true);
  keep("route", {r.probs_TE, r.topk_weights_TK}, {logits});
  const at::Tensor w0 = randn({24, D}, 30, dtype), w1 = randn({16, D}, 31, dtype), A = leaf({4, D}, 32, at::kFloat),
                   B = leaf({24, 4}, 33, at::kFloat), A1 = leaf({3, D}, 34, at::kFloat),
                   B1 = leaf({16, 3}, 35, at::kFloat), rows = on(at::arange(T) * 2 % T).narrow(0, 0, (T + 1) / 2);
  const std::vector<at::Tensor> adapted =
      adapted_linear(low, {{{on(w0), {}}, {{A, B, 2.0, {0}}}}, {{on(w1), {}}, {{A1, B1, 0.5, {0}}}}}, {rows});
  keep("adapted_linear", {adapted[0], adapted[1]}, {low, A, B, A1, B1});
  const at::Tensor head = leaf({300, D}, 8, dtype);
  keep("loss", {linear_cross_entropy(low, head, on(at::arange(T) * 7 % 300), 0.1)}, {low, head});

  const MoeCase c{{T, 8, 2, 2, 2}, D, 32, 5};
  const MoeInputs in = make_moe(c, dtype, at::kFloat, Layout::joined);
  std::vector<at::Tensor> leaves;
  for (const auto& t : in.leaves) leaves.push_back(on(t).set_requires_grad(true));
  const auto [ids, group] = make_routing(c.routing);
  const Dispatch d = kernels::make_dispatch(on(ids), c.routing.E, on(group), c.routing.groups);
  ExpertFfnWeights weights;
  for (int64_t e = 0; e < c.routing.E; ++e) {
    weights.gate_FD.push_back(on(in.problem.weights.gate_FD[e]));
    weights.up_FD.push_back(on(in.problem.weights.up_FD[e]));
    weights.down_DF.push_back(on(in.problem.weights.down_DF[e]));
  }
  join_experts(weights.gate_FD, weights.up_FD, weights.down_DF);
  ExpertFfnAdapters adapters;
  size_t next = 2;
  for (int s = 0; s < kSites; ++s)
    for (const ExpertLowRank& t : in.problem.terms[s]) {
      (s == kGate ? adapters.gate
       : s == kUp ? adapters.up
                  : adapters.down)
          .push_back({leaves[next], leaves[next + 1], t.scale, t.acts});
      next += 2;
    }
  keep("moe_ffn", {moe_ffn(leaves[0], leaves[1], d, weights, adapters)}, leaves);

  const at::Tensor q = leaf({T, 4, 16}, 20, dtype), k = leaf({T, 2, 16}, 21, dtype), v = leaf({T, 2, 16}, 22, dtype);
  const std::vector<int64_t> cu{0, 7, 7, T};
  keep("packed_attention", {packed_attention(q, k, v, cu, cu, 0, 0.25)}, {q, k, v});
  return out;
}

// float32: equal but for the order of sums. bf16: no worse than the CPU's, by the float32 results.
inline void compare_public_ops(const Named& device, const Named& host, at::ScalarType dtype) {
  const Named exact = public_ops(at::kCPU, at::kFloat);
  ASSERT_EQ(device.size(), host.size());
  for (size_t i = 0; i < host.size(); ++i) {
    const auto& [name, value] = device[i];
    const double scale = 1 + largest(exact[i].second), error = distance(value, exact[i].second);
    if (dtype == at::kFloat)
      EXPECT_LT(error, 1e-4 * scale) << name;
    else
      EXPECT_LE(error, 2 * distance(host[i].second, exact[i].second) + 1e-2 * scale) << name;
  }
}

}  // namespace moegraft::kernels::cuda
