// One case table per op: fused against plain ATen in double-checked precision, and gradients.
#include <gtest/gtest.h>
#include "libtorch.h"

#include <torch/csrc/autograd/autograd.h>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/kernels/route.h"

namespace moegraft::kernels {
namespace {

at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  auto g = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::empty(shape, at::kDouble).normal_(0, 1, g).to(dtype);
}
double distance(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == 0 ? 0 : (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

at::Tensor plain_rms(const at::Tensor& x, const at::Tensor& w, double eps) {
  return w * (x * at::rsqrt(x.square().mean(-1, true) + eps));
}

TEST(RmsNorm, ClosedForm) {
  const at::Tensor y = rms_norm(at::tensor({3.0f, 4.0f}).view({1, 2}), at::tensor({2.0f, 1.0f}), 0.0);
  EXPECT_FLOAT_EQ(y[0][0].item<float>(), 6.0f / std::sqrt(12.5f));
  EXPECT_FLOAT_EQ(y[0][1].item<float>(), 4.0f / std::sqrt(12.5f));
}

TEST(RmsNorm, ValuesAndGradientsMatchAutograd) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1}, {5, 7}, {3, 4, 24}, {33, 192}, {0, 8}}) {
    at::Tensor x = randn(shape, 1).set_requires_grad(true), w = randn({shape.back()}, 2).set_requires_grad(true);
    at::Tensor xd = x.detach().to(at::kDouble).set_requires_grad(true),
               wd = w.detach().to(at::kDouble).set_requires_grad(true);
    const at::Tensor y = rms_norm(x, w, 1e-5), yd = plain_rms(xd, wd, 1e-5);
    EXPECT_LT(distance(y, yd), 1e-5);
    const at::Tensor d = randn(shape, 3);
    y.backward(d);
    yd.backward(d.to(at::kDouble));
    EXPECT_LT(distance(x.grad(), xd.grad()), 2e-5);
    EXPECT_LT(distance(w.grad(), wd.grad()), 1e-4);
  }
}

TEST(RmsNorm, Bfloat16IsNoWorseThanPlain) {
  const at::Tensor x = randn({64, 192}, 1), w = randn({192}, 2),
                   exact = plain_rms(x.to(at::kBFloat16).to(at::kDouble), w.to(at::kBFloat16).to(at::kDouble), 1e-5);
  const at::Tensor xb = x.to(at::kBFloat16), wb = w.to(at::kBFloat16);
  const double ours = distance(rms_norm(xb, wb, 1e-5), exact), plain = distance(plain_rms(xb, wb, 1e-5), exact);
  EXPECT_LE(ours, 2 * plain + 1e-3);
}

TEST(Rotary, IsTheComplexRotationAndItsBackwardTheInverse) {
  const int64_t T = 9, H = 3, C = 8;
  at::Tensor x = randn({T, H, C}, 4).set_requires_grad(true);
  const at::Tensor angle = randn({T, C / 2}, 5);
  const at::Tensor y = rotary(x, angle.cos(), angle.sin());
  const at::Tensor z =
      at::complex(x.detach().narrow(2, 0, C / 2).contiguous(), x.detach().narrow(2, C / 2, C / 2).contiguous()) *
      at::polar(at::ones_like(angle), angle).unsqueeze(1);
  EXPECT_LT(distance(y, at::cat({at::real(z), at::imag(z)}, 2)), 1e-5);
  y.backward(y.detach());  // an orthogonal map: J^T J x = x
  EXPECT_LT(distance(x.grad(), x.detach()), 1e-5);
}

at::Tensor plain_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::vector<int64_t>& cu, int64_t window, double scale) {
  std::vector<at::Tensor> out;
  const int64_t repeat = q.size(1) / k.size(1);
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    const int64_t b = cu[s], n = cu[s + 1] - b;
    const at::Tensor qs = q.narrow(0, b, n).transpose(0, 1),
                     ks = k.narrow(0, b, n).repeat_interleave(repeat, 1).transpose(0, 1),
                     vs = v.narrow(0, b, n).repeat_interleave(repeat, 1).transpose(0, 1);
    const at::Tensor i = at::arange(n).unsqueeze(1), j = at::arange(n).unsqueeze(0);
    at::Tensor hidden = j > i;
    if (window > 0) hidden = hidden | (j <= i - window);
    out.push_back(
        at::matmul(at::softmax((at::matmul(qs, ks.transpose(1, 2)) * scale).masked_fill(hidden, -INFINITY), -1), vs)
            .transpose(0, 1));
  }
  return at::cat(out, 0);
}

bool has_blocks() { return pack_weight(at::zeros({16, 16})).packed() != nullptr; }

// One pass over queries and keys has the bits, forward and backward, of the operations one after the other.
TEST(NormRotary, IsNormThenRotaryToTheBit) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble})
    for (const int64_t T : {1, 7, 40})
      for (const int64_t C : {2, 6, 16, 40})
        for (const int kind : {0, 1, 2}) {  // no norm, of each head, of all heads together
          const int64_t H = 3, G = 1;
          const at::Tensor angle = randn({T, C / 2}, 1), cos = angle.cos(), sin = angle.sin();
          const auto part = [&](int64_t heads, uint64_t seed) {
            return HeadRows{randn({T, heads * C}, seed).to(dtype).requires_grad_(true), heads,
                            kind == 0 ? at::Tensor() : randn({kind == 1 ? C : heads * C}, seed + 1).to(dtype)};
          };
          const HeadRows q = part(H, 2), k = part(G, 4);
          const auto plain = [&](const HeadRows& r) {
            at::Tensor x = r.x_TX;
            if (kind == 1) x = rms_norm(x.view({T, r.num_heads, C}), r.norm, 1e-5);
            if (kind == 2) x = rms_norm(x, r.norm, 1e-5);
            return rotary(x.view({T, r.num_heads, C}), cos, sin);
          };
          const std::vector<at::Tensor> x{q.x_TX, k.x_TX}, want{plain(q), plain(k)},
              got = norm_rotary({q, k}, cos, sin, 1e-5);
          const std::vector<at::Tensor> d{randn({T, H, C}, 6).to(dtype), randn({T, G, C}, 7).to(dtype)};
          const auto dwant = torch::autograd::grad(want, x, d),
                     dgot = torch::autograd::grad(got, x, d, /*retain_graph=*/true);
          for (size_t i = 0; i < 2; ++i) {
            ASSERT_TRUE(at::equal(got[i], want[i])) << dtype << " T " << T << " C " << C << " kind " << kind;
            ASSERT_TRUE(at::equal(dgot[i], dwant[i])) << dtype << " T " << T << " C " << C << " kind " << kind;
          }
          const auto alone = torch::autograd::grad({got[1]}, x, {d[1]}, /*retain_graph=*/false, /*create_graph=*/false,
                                                   /*allow_unused=*/true);
          EXPECT_TRUE(at::equal(alone[1], dwant[1]));
        }
}

TEST(Attention, PackedMatchesPlainWithGradients) {
  struct Case {
    std::vector<int64_t> cu;
    int64_t H, G, C, window;
  };
  for (const auto& c : std::vector<Case>{{{0, 1}, 1, 1, 2, 0},
                                         {{0, 5, 5, 18, 19}, 6, 2, 16, 0},
                                         {{0, 37}, 4, 1, 24, 0},
                                         {{0, 40, 45}, 4, 4, 8, 7},
                                         {{0, 3, 9, 12, 40}, 2, 1, 64, 1},
                                         {{0, 130}, 2, 2, 32, 0},
                                         {{0, 200, 201}, 4, 2, 80, 0},
                                         {{0, 1100}, 2, 1, 16, 0},
                                         {{0, 1200, 1207}, 2, 1, 6, 300},
                                         {{0, 700}, 1, 1, 130, 64}}) {
    const int64_t T = c.cu.back();
    std::vector<at::Tensor> f, d;
    for (int i = 0; i < 3; ++i) {
      const at::Tensor x = randn({T, i == 0 ? c.H : c.G, c.C}, 10 + i);
      f.push_back(x.clone().set_requires_grad(true));
      d.push_back(x.to(at::kDouble).set_requires_grad(true));
    }
    const at::Tensor y = packed_attention(f[0], f[1], f[2], c.cu, c.cu, c.window, 0.3),
                     z = plain_attention(d[0], d[1], d[2], c.cu, c.window, 0.3);
    EXPECT_LT(distance(y, z), 1e-5);
    const at::Tensor g = randn(y.sizes(), 20);
    y.backward(g);
    z.backward(g.to(at::kDouble));
    // Without block products this is ATen's flash attention, whose exponentials have 20 bits: held by the size of the
    // gradients.
    const auto bound = [&](const at::Tensor& exact) {
      return has_blocks() ? 3e-5 : std::max(3e-5, 1e-5 * exact.abs().max().item<double>());
    };
    for (int i = 0; i < 3; ++i)
      EXPECT_LT(distance(f[i].grad(), d[i].grad()), bound(d[i].grad())) << "input " << i << " T " << T;
  }
}

TEST(Attention, QueriesMayFollowEarlierKeys) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t window : {0, 5, 600}) {
      // Three sequences: 700 earlier keys, none, and 3 keys with no queries.
      const std::vector<int64_t> cu_q{0, 70, 81, 81}, cu_kv{0, 770, 781, 784};
      std::vector<at::Tensor> f, d;
      for (int i = 0; i < 3; ++i) {
        const at::Tensor x = randn({i == 0 ? 81 : 784, i == 0 ? 4 : 2, 24}, 10 + i).to(dtype);
        f.push_back(x.clone().set_requires_grad(true));
        d.push_back(x.to(at::kDouble).set_requires_grad(true));
      }
      const at::Tensor y = packed_attention(f[0], f[1], f[2], cu_q, cu_kv, window, 0.2);
      // The plain one over whole sequences, whose earlier queries nobody looks at.
      std::vector<at::Tensor> rows;
      for (size_t s = 0; s < 3; ++s) {
        const int64_t queries = cu_q[s + 1] - cu_q[s], keys = cu_kv[s + 1] - cu_kv[s];
        const at::Tensor padded =
            at::cat({at::zeros({keys - queries, 4, 24}, at::kDouble), d[0].narrow(0, cu_q[s], queries)}, 0);
        rows.push_back(plain_attention(padded, d[1].narrow(0, cu_kv[s], keys), d[2].narrow(0, cu_kv[s], keys),
                                       {0, keys}, window, 0.2)
                           .narrow(0, keys - queries, queries));
      }
      const at::Tensor z = at::cat(rows, 0), g = randn(y.sizes(), 20).to(dtype);
      const double tolerance =
          dtype == at::kFloat ? 3e-5 : 4e-2;  // bf16: 2^-8 relative on values up to 4, a few roundings deep
      EXPECT_LT(distance(y, z), tolerance);
      y.backward(g);
      z.backward(g.to(at::kDouble));
      for (int i = 0; i < 3; ++i)
        EXPECT_LT(distance(f[i].grad(), d[i].grad()), tolerance * (1 + d[i].grad().abs().max().item<double>()))
            << "input " << i << " window " << window;
    }
}

TEST(Attention, CacheContinuesWhatPackedComputes) {
  for (const int64_t window : {0, 4}) {
    const std::vector<int64_t> lengths{11, 6}, past{7, 0};
    const at::Tensor q = randn({17, 4, 8}, 1), k = randn({17, 2, 8}, 2), v = randn({17, 2, 8}, 3);
    const at::Tensor whole = packed_attention(q, k, v, {0, 11, 17}, {0, 11, 17}, window, 0.5);
    at::Tensor keys = at::full({2, 16, 2, 8}, NAN),
               values = keys.clone();  // what lies beyond the length must never be read
    keys[0].narrow(0, 0, 11).copy_(k.narrow(0, 0, 11));
    values[0].narrow(0, 0, 11).copy_(v.narrow(0, 0, 11));
    keys[1].narrow(0, 0, 6).copy_(k.narrow(0, 11, 6));
    values[1].narrow(0, 0, 6).copy_(v.narrow(0, 11, 6));
    const at::Tensor rest = at::cat({q.narrow(0, 7, 4), q.narrow(0, 11, 6)}, 0);
    const at::Tensor y = cached_attention(rest, keys, values, {0, 4, 10}, lengths, window, 0.5);
    EXPECT_LT(distance(y, at::cat({whole.narrow(0, 7, 4), whole.narrow(0, 11, 6)}, 0)), 1e-5);
  }
}

TEST(Attention, OneQueryOfEachSequenceOfACacheEqualsThePlainSum) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t window : {0, 1, 5, 64})
      for (const int64_t C : {8, 20, 64}) {
        const std::vector<int64_t> lengths{1, 16, 4, 9};
        const at::Tensor q = randn({4, 6, C}, 1).to(dtype);
        at::Tensor keys = at::full({5, 16, 2, C}, NAN, dtype),
                   values = keys.clone();  // what lies beyond the length must never be read
        for (int64_t b = 0; b < 4; ++b) {
          keys[b].narrow(0, 0, lengths[size_t(b)]).copy_(randn({lengths[size_t(b)], 2, C}, 10 + uint64_t(b)));
          values[b].narrow(0, 0, lengths[size_t(b)]).copy_(randn({lengths[size_t(b)], 2, C}, 20 + uint64_t(b)));
        }
        const at::Tensor y = cached_attention(q, keys, values, {0, 1, 2, 3, 4}, lengths, window, 0.3);
        for (int64_t b = 0; b < 4; ++b) {
          const int64_t n = lengths[size_t(b)], first = window > 0 ? std::max<int64_t>(0, n - window) : 0;
          const auto seen = [&](const at::Tensor& cache) {
            return cache[b].narrow(0, first, n - first).repeat_interleave(3, 1).to(at::kDouble);
          };  // [S, H, C]
          const at::Tensor weights = at::softmax(0.3 * (seen(keys) * q[b].to(at::kDouble)).sum(-1), 0);  // [S, H]
          EXPECT_LT(distance(y[b], (weights.unsqueeze(-1) * seen(values)).sum(0)), dtype == at::kFloat ? 2e-6 : 2e-2)
              << "sequence " << b << ", window " << window << ", width " << C;
        }
      }
}

TEST(Attention, AStepWithItsLengthsOnTheDeviceEqualsOneWithThemOnTheHost) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t window : {0, 1, 4, 64}) {
      const std::vector<int64_t> before{0, 15, 3, 7};
      const at::Tensor q = randn({4, 6, 8}, 1).to(dtype), keys = randn({5, 16, 2, 8}, 2).to(dtype),
                       values = randn({5, 16, 2, 8}, 3).to(dtype);
      std::vector<int64_t> lengths = before;
      for (int64_t& length : lengths) ++length;
      const at::Tensor expected = cached_attention(q, keys, values, {0, 1, 2, 3, 4}, lengths, window, 0.5);
      const at::Tensor y =
          step_attention(q, keys, values, at::tensor(at::ArrayRef<int64_t>(before), at::kLong), window, 0.5);
      EXPECT_LT(distance(y, expected), dtype == at::kFloat ? 1e-6 : 2e-2) << "window " << window;
    }
}

TEST(Route, EqualsSoftmaxTopKAndTheirGradients) {
  for (const auto& [T, E, K] : std::vector<std::array<int64_t, 3>>{
           {1, 1, 1}, {3, 4, 2}, {200, 8, 2}, {70, 17, 5}, {65, 64, 8}, {9, 130, 130}, {300, 256, 8}})
    for (const bool renormalise : {false, true}) {
      const at::Tensor logits = (3 * randn({T, E}, 7)).set_requires_grad(true),
                       exact = logits.detach().to(at::kDouble).set_requires_grad(true);
      const Route r = route(logits, K, renormalise);
      const at::Tensor probs = at::softmax(exact, -1), ids = std::get<1>(at::topk(probs, K, -1));
      at::Tensor weights = probs.gather(1, ids);
      if (renormalise) weights = weights / weights.sum(-1, true);
      EXPECT_TRUE(at::equal(r.topk_ids_TK, ids)) << T << " " << E << " " << K;
      EXPECT_LT(distance(r.probs_TE, probs), 1e-6);
      EXPECT_LT(distance(r.topk_weights_TK, weights), 1e-6);
      const at::Tensor gw = randn({T, K}, 8), gp = randn({T, E}, 9);
      (r.topk_weights_TK * gw).sum().backward();
      (weights * gw).sum().backward({}, true);
      EXPECT_LT(distance(logits.grad(), exact.grad()), 1e-5) << T << " " << E << " " << K;
      const Route both = route(logits, K, renormalise);
      ((both.topk_weights_TK * gw).sum() + (both.probs_TE * gp).sum()).backward();
      ((weights * gw).sum() + (probs * gp).sum()).backward();
      EXPECT_LT(distance(logits.grad(), exact.grad()), 2e-5) << "with a gradient of the probabilities";
    }
}

TEST(Route, TakesTheLowerOfEqualsAndStaysInRangeWithoutNumbers) {
  at::Tensor logits = at::zeros({3, 40});
  logits[1][37] = logits[1][21] = logits[1][20] = 1;
  logits[2][5] = NAN;
  const Route r = route(logits, 4, true);
  EXPECT_TRUE(at::equal(r.topk_ids_TK[0], at::arange(4)));
  EXPECT_TRUE(at::equal(r.topk_ids_TK[1], at::tensor({20, 21, 37, 0}, at::kLong)));
  EXPECT_TRUE(at::equal(r.topk_ids_TK[2], at::arange(4)));
  EXPECT_FLOAT_EQ(r.topk_weights_TK[0][3].item<float>(), 0.25f);
  EXPECT_TRUE(r.topk_weights_TK[2].isnan().all().item<bool>());
  EXPECT_EQ(route(at::zeros({0, 5}), 2, false).topk_ids_TK.sizes(), (at::IntArrayRef{0, 2}));
}

// Cases of the expert path: sizes and who is routed where.
struct MoeCase {
  int64_t T, D, F, E, K, groups;
  int routing;  // 0 random, 1 all tokens to expert 0 (and following), 2 last expert empty, 3 some slots' experts
                // elsewhere
};
const std::vector<MoeCase> kMoeCases{{1, 4, 3, 2, 1, 1, 0},   {7, 8, 5, 4, 2, 2, 0},     {50, 16, 24, 8, 3, 2, 2},
                                     {30, 8, 8, 4, 4, 1, 1},  {600, 12, 20, 3, 1, 3, 1}, {65, 16, 8, 5, 2, 2, 1},
                                     {70, 16, 8, 5, 3, 2, 3}, {300, 8, 12, 4, 1, 1, 3},  {2, 8, 12, 4, 2, 1, 3}};

struct MoeInputs {
  at::Tensor x, weights, ids, group;
  ExpertFfnWeights frozen;
  ExpertFfnAdapters adapters;
  std::vector<at::Tensor> leaves;
};

bool is_absent(const MoeCase& c, int64_t t, int64_t k) {
  return c.routing == 3 && (t % 4 == 0 || (t + k) % 3 == 0);
}  // every fourth token has none

MoeInputs make_inputs(const MoeCase& c, at::ScalarType dtype, bool stacked) {
  MoeInputs in;
  const auto leaf = [&](at::IntArrayRef shape, uint64_t seed, double scale) {
    in.leaves.push_back((randn(shape, seed, at::kDouble) * scale).to(dtype).set_requires_grad(true));
    return in.leaves.back();
  };
  in.x = leaf({c.T, c.D}, 1, 1.0);
  in.weights = leaf({c.T, c.K}, 2, 1.0);
  Rng rng(3, "route");
  in.ids = at::empty({c.T, c.K}, at::kLong);
  in.group = at::empty({c.T}, at::kLong);
  for (int64_t t = 0; t < c.T; ++t) {
    const auto order = rng.permutation(c.routing == 2 ? c.E - 1 : c.E);
    for (int64_t k = 0; k < c.K; ++k) in.ids[t][k] = is_absent(c, t, k) ? -1 : c.routing == 1 ? k : order[k];
    in.group[t] = int64_t(rng.below(c.groups));
  }
  const at::Tensor gate = stacked ? leaf({c.E, c.F, c.D}, 4, 0.5) : randn({c.E, c.F, c.D}, 4, dtype) * 0.5;
  const at::Tensor up = stacked ? leaf({c.E, c.F, c.D}, 5, 0.5) : randn({c.E, c.F, c.D}, 5, dtype) * 0.5;
  const at::Tensor down = stacked ? leaf({c.E, c.D, c.F}, 6, 0.5) : randn({c.E, c.D, c.F}, 6, dtype) * 0.5;
  for (int64_t e = 0; e < c.E; ++e) {
    in.frozen.gate_FD.push_back(gate.detach()[e]);
    in.frozen.up_FD.push_back(up.detach()[e]);
    in.frozen.down_DF.push_back(down.detach()[e]);
  }
  if (stacked) in.frozen.gate_EFD = gate, in.frozen.up_EFD = up, in.frozen.down_EDF = down;
  const int64_t P = 3;
  const auto term = [&](int64_t width_in, int64_t width_out, uint64_t seed) {
    std::vector<bool> acts(c.groups);
    for (int64_t g = 0; g < c.groups; ++g) acts[g] = g == c.groups - 1;
    return ExpertLowRank{leaf({c.E, P, width_in}, seed, 0.5), leaf({c.E, width_out, P}, seed + 1, 0.5), 1.5, acts};
  };
  in.adapters.gate = {term(c.D, c.F, 7)};
  in.adapters.up = {term(c.D, c.F, 9), term(c.D, c.F, 11)};
  in.adapters.down = {term(c.F, c.D, 13)};
  return in;
}

at::Tensor moe(MoeInputs in, const MoeCase& c, bool fused) {
  const Dispatch d = make_dispatch(in.ids, c.E, in.group, c.groups, (in.ids >= 0).sum().item<int64_t>());
  if (!fused) return moe_ffn_reference(in.x, in.weights, d, in.frozen, in.adapters);
  in.frozen.panels = make_expert_panels(in.frozen, nullptr, c.T % 2 == 1);  // both ways to hold experts
  return moe_ffn(in.x, in.weights, d, in.frozen, in.adapters);
}

// Experts that lie in one layout give what those in two give; in bf16 to the bit, as their panels are turned and then
// multiplied alike.
TEST(ExpertFfn, OneLayoutGivesTheGradientsOfTwo) {
  auto cases = kMoeCases;
  cases.insert(cases.end(), {{400, 136, 72, 3, 2, 2, 0}, {90, 70, 97, 2, 1, 2, 0}, {33, 9, 131, 2, 2, 1, 0}});
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& c : cases) {
      if (!one_layout_serves(dtype)) continue;
      MoeInputs in[2]{make_inputs(c, dtype, false), make_inputs(c, dtype, false)};
      at::Tensor y[2];
      for (const bool lean : {false, true}) {
        auto& i = in[lean];
        for (auto* site :
             {&i.adapters.gate, &i.adapters.up, &i.adapters.down})  // factors and weights are float32 masters
          for (auto& term : *site)
            for (at::Tensor* f : {&term.A_EPX, &term.B_EXP}) *f = f->detach().to(at::kFloat).set_requires_grad(true);
        i.weights = i.weights.detach().to(at::kFloat).set_requires_grad(true);
        i.frozen.panels = make_expert_panels(i.frozen, nullptr, lean);
        y[lean] =
            moe_ffn(i.x, i.weights, make_dispatch(i.ids, c.E, i.group, c.groups, (i.ids >= 0).sum().item<int64_t>()),
                    i.frozen, i.adapters);
        y[lean].backward(randn(y[lean].sizes(), 30, dtype));
      }
      ASSERT_TRUE(at::equal(y[0], y[1]));
      const auto compare = [&](const at::Tensor& two, const at::Tensor& one, const char* what) {
        if (dtype == at::kBFloat16)
          EXPECT_TRUE(at::equal(two, one)) << what << " T " << c.T;
        else
          EXPECT_LT(distance(two, one), 1e-4 * (1 + two.abs().max().item<double>())) << what << " T " << c.T;
      };
      compare(in[0].x.grad(), in[1].x.grad(), "x");
      compare(in[0].weights.grad(), in[1].weights.grad(), "weights");
      for (size_t i = 0; i < 2; ++i)
        compare(in[0].adapters.up[i].A_EPX.grad(), in[1].adapters.up[i].A_EPX.grad(), "up's A");
      compare(in[0].adapters.down[0].B_EXP.grad(), in[1].adapters.down[0].B_EXP.grad(), "down's B");
    }
}

TEST(ExpertFfn, ValuesAndGradientsMatchTheReference) {
  for (const bool stacked : {false, true})
    for (const auto& c : kMoeCases) {
      MoeInputs f = make_inputs(c, at::kFloat, stacked), d = make_inputs(c, at::kDouble, stacked);
      const at::Tensor y = moe(f, c, true), z = moe(d, c, false);
      EXPECT_LT(distance(y, z), 1e-4 * (1 + z.abs().max().item<double>()));
      const at::Tensor g = randn(y.sizes(), 30);
      y.backward(g);
      z.backward(g.to(at::kDouble));
      for (size_t i = 0; i < f.leaves.size(); ++i) {
        const at::Tensor &a = f.leaves[i].grad(), &b = d.leaves[i].grad();
        ASSERT_TRUE(a.defined()) << i;
        EXPECT_LT(distance(a, b), 1e-4 * (1 + b.abs().max().item<double>())) << "leaf " << i << " T " << c.T;
      }
    }
}

// Weights of tokens on terms: one tensor for gate and the first of up's two, another for down.
void add_row_weights(MoeInputs& in, const MoeCase& c, at::ScalarType dtype) {
  for (const uint64_t seed : {40, 41}) in.leaves.push_back(randn({c.T}, seed, dtype).set_requires_grad(true));
  in.adapters.down[0].weight_X = in.leaves.back();
  in.adapters.gate[0].weight_X = in.adapters.up[0].weight_X = in.leaves[in.leaves.size() - 2];
}

const std::vector<MoeCase> kWideMoeCases{
    {33, 17, 31, 3, 2, 2, 0}, {1500, 40, 72, 2, 1, 2, 0}, {300, 130, 33, 7, 4, 1, 2}, {90, 70, 97, 2, 1, 2, 3}};

TEST(ExpertFfn, WeightsOfRowsMatchTheReference) {
  auto cases = kMoeCases;
  cases.insert(cases.end(), kWideMoeCases.begin(), kWideMoeCases.end());
  for (const bool stacked : {false, true})
    for (const auto& c : cases) {
      MoeInputs f = make_inputs(c, at::kFloat, stacked), d = make_inputs(c, at::kDouble, stacked);
      add_row_weights(f, c, at::kFloat);
      add_row_weights(d, c, at::kDouble);
      const at::Tensor y = moe(f, c, true), z = moe(d, c, false);
      EXPECT_LT(distance(y, z), 1e-4 * (1 + z.abs().max().item<double>()));
      const at::Tensor g = randn(y.sizes(), 30);
      y.backward(g);
      z.backward(g.to(at::kDouble));
      for (size_t i = 0; i < f.leaves.size(); ++i) {
        const at::Tensor &a = f.leaves[i].grad(), &b = d.leaves[i].grad();
        ASSERT_TRUE(a.defined()) << i;
        EXPECT_LT(distance(a, b), 1e-4 * (1 + b.abs().max().item<double>()))
            << "leaf " << i << " T " << c.T << (stacked ? " stacked" : "");
      }
    }
}

// Factors and weights as in training: float32 masters under a base in bf16.
MoeInputs with_masters(const MoeCase& c, bool row_weights) {
  MoeInputs in = make_inputs(c, at::kBFloat16, false);
  in.weights = in.weights.detach().to(at::kFloat).set_requires_grad(true);
  in.leaves = {in.x, in.weights};
  for (auto* site : {&in.adapters.gate, &in.adapters.up, &in.adapters.down})
    for (auto& term : *site)
      for (at::Tensor* factor : {&term.A_EPX, &term.B_EXP}) {
        *factor = factor->detach().to(at::kFloat).set_requires_grad(true);
        in.leaves.push_back(*factor);
      }
  if (row_weights) add_row_weights(in, c, at::kFloat);
  return in;
}

TEST(ExpertFfn, WeightsOfRowsInBfloat16AreNoWorseThanThePlainPath) {
  for (const auto& c : kWideMoeCases) {
    MoeInputs ours = with_masters(c, true), plain = with_masters(c, true), exact = make_inputs(c, at::kDouble, false);
    add_row_weights(exact, c, at::kDouble);
    const at::Tensor g = randn({c.T, c.D}, 30);
    moe(ours, c, true).backward(g.to(at::kBFloat16));
    moe(plain, c, false).backward(g.to(at::kBFloat16));
    moe(exact, c, false).backward(g.to(at::kDouble));
    ASSERT_EQ(ours.leaves.size(), exact.leaves.size());
    for (size_t i = 0; i < ours.leaves.size(); ++i) {
      const at::Tensor& want = exact.leaves[i].grad();
      EXPECT_LE(distance(ours.leaves[i].grad(), want),
                2 * distance(plain.leaves[i].grad(), want) + 1e-2 * (1 + want.abs().max().item<double>()))
          << "leaf " << i << " T " << c.T;
    }
  }
}

TEST(ExpertFfn, WeightsOfOneAreNone) {
  const auto run = [](MoeInputs in, const MoeCase& c, bool weighted) {
    for (auto* site : {&in.adapters.gate, &in.adapters.up, &in.adapters.down})
      for (auto& term : *site)
        if (weighted) term.weight_X = at::ones({c.T});
    const at::Tensor y = moe(in, c, true);
    y.backward(randn(y.sizes(), 30).to(y.scalar_type()));
    std::vector<at::Tensor> out{y.detach()};
    for (const at::Tensor& leaf : in.leaves) out.push_back(leaf.grad());
    return out;
  };
  for (const auto& c : kWideMoeCases)
    for (const int how : {0, 1, 2}) {  // block products in float32, trained experts, block products in bf16
      const auto inputs = [&] { return how == 2 ? with_masters(c, false) : make_inputs(c, at::kFloat, how == 1); };
      const auto with = run(inputs(), c, true), without = run(inputs(), c, false);
      for (size_t i = 0; i < with.size(); ++i)
        EXPECT_TRUE(at::equal(with[i], without[i])) << "result " << i << " T " << c.T << " way " << how;
    }
}

// A slot whose expert is elsewhere is a slot of weight zero, but that its weight has no gradient.
TEST(ExpertFfn, AnAbsentSlotCountsAsWeightZero) {
  const MoeCase c{70, 16, 8, 5, 3, 2, 3};
  MoeInputs absent = make_inputs(c, at::kFloat, false), zeroed = make_inputs(c, at::kFloat, false);
  const at::Tensor here = zeroed.ids >= 0;
  zeroed.ids = zeroed.ids.clamp_min(0);
  at::Tensor weights = (zeroed.weights.detach() * here).set_requires_grad(true);
  std::swap(zeroed.weights, weights);
  const at::Tensor y = moe(absent, c, true), z = moe(zeroed, c, false), g = randn(y.sizes(), 30);
  EXPECT_LT(distance(y, z), 1e-4);
  EXPECT_EQ(y[0].abs().max().item<float>(), 0.0f);  // no expert here at all
  y.backward(g);
  z.backward(g);
  EXPECT_LT(distance(absent.weights.grad(), zeroed.weights.grad() * here),
            1e-4 * zeroed.weights.grad().abs().max().item<double>());
  EXPECT_EQ(absent.weights.grad().masked_select(here.logical_not()).abs().max().item<float>(), 0.0f);
  for (size_t i = 0; i < absent.leaves.size(); ++i)
    if (i != 1) {
      EXPECT_LT(distance(absent.leaves[i].grad(), zeroed.leaves[i].grad()),
                1e-4 * (1 + zeroed.leaves[i].grad().abs().max().item<double>()))
          << i;
    }
}

TEST(ExpertFfn, KeptFactorsGiveTheSameBits) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& c : kMoeCases) {
      MoeInputs in = make_inputs(c, at::kFloat, false);
      in.x = in.x.detach().to(dtype);
      for (auto* list : {&in.frozen.gate_FD, &in.frozen.up_FD, &in.frozen.down_DF})
        for (at::Tensor& w : list->own()) w = w.to(dtype);
      const auto run = [&](std::shared_ptr<FactorCache> cache) {
        const at::NoGradGuard no_grad;
        in.adapters.cache = std::move(cache);
        return moe(in, c, true);
      };
      const auto cache = make_factor_cache();
      const auto check = [&](const char* what) {
        const at::Tensor plain = run(nullptr);
        EXPECT_TRUE(at::equal(run(cache), plain)) << what << ", T " << c.T;
        EXPECT_TRUE(at::equal(run(cache), plain)) << what << " again, T " << c.T;
        return plain;
      };
      const at::Tensor first = check("as made");
      in.adapters.gate[0].acts.flip();
      check("acting elsewhere");
      in.adapters.gate[0].acts.flip();
      in.adapters.down[0].A_EPX = in.adapters.down[0].A_EPX.detach() * 2;
      check("another factor");
      in.adapters.down[0].scale *= 3;
      const at::Tensor last = check("another scale");
      if (c.T == 600) { EXPECT_GT(distance(first, last), 1e-3); }
    }
}

TEST(ExpertFfn, KeptFactorsAreNotForTraining) {
  const MoeCase c{50, 16, 24, 8, 3, 2, 2};
  MoeInputs in = make_inputs(c, at::kFloat, false);
  in.adapters.cache = make_factor_cache();
  const at::Tensor before = moe(in, c, true);
  {
    const at::NoGradGuard no_grad;
    moe(in, c, true);  // keeps them
    in.adapters.down[0].B_EXP.mul_(2);
  }
  const at::Tensor after = moe(in, c, true);
  in.adapters.cache = nullptr;
  EXPECT_TRUE(at::equal(after, moe(in, c, true)));
  EXPECT_GT(distance(after, before), 1e-3);
}

TEST(ExpertFfn, GradientsMatchFiniteDifferences) {
  const MoeCase c{5, 4, 3, 3, 2, 2, 3};
  MoeInputs in = make_inputs(c, at::kDouble, true);
  add_row_weights(in, c, at::kDouble);
  const at::Tensor g = randn({c.T, c.D}, 31, at::kDouble);
  moe(in, c, true).backward(g);
  const double h = 1e-6;
  for (size_t i = 0; i < in.leaves.size(); ++i) {
    at::Tensor flat = in.leaves[i].detach().view({-1});
    for (const int64_t j : {int64_t{0}, flat.size(0) / 2, flat.size(0) - 1}) {
      at::NoGradGuard no_grad;
      const double before = flat[j].item<double>();
      flat[j] = before + h;
      const double plus = (moe(in, c, true) * g).sum().item<double>();
      flat[j] = before - h;
      const double minus = (moe(in, c, true) * g).sum().item<double>();
      flat[j] = before;
      EXPECT_NEAR(in.leaves[i].grad().view({-1})[j].item<double>(), (plus - minus) / (2 * h), 1e-6)
          << "leaf " << i << " element " << j;
    }
  }
}

TEST(ExpertFfn, AnIdleExpertHasExactlyZeroGradientAndTextRowsKeepTheBaseBits) {
  const MoeCase c{40, 16, 8, 4, 2, 2, 2};  // expert 3 is never selected
  MoeInputs in = make_inputs(c, at::kFloat, false);
  moe(in, c, true).sum().backward();
  EXPECT_EQ(in.adapters.gate[0].A_EPX.grad()[3].abs().max().item<float>(), 0.0f);
  EXPECT_GT(in.adapters.gate[0].A_EPX.grad()[0].abs().max().item<float>(), 0.0f);
  // All rows text (group 0): the adapters act on group 1 only, so the bits are those of a model without adapters.
  in.group.zero_();
  MoeInputs base = in;
  base.adapters = {};
  MoeCase plain = c;
  plain.groups = 1;
  base.group = at::Tensor();
  EXPECT_TRUE(at::equal(moe(in, c, true), moe(base, plain, true)));
}

TEST(ExpertFfn, Bfloat16IsNoWorseThanThePlainPath) {
  const MoeCase c{200, 64, 48, 8, 2, 2, 0};
  const MoeInputs b = make_inputs(c, at::kBFloat16, false), d = make_inputs(c, at::kDouble, false);
  const at::Tensor exact = moe(d, c, false);
  const double ours = distance(moe(b, c, true), exact), plain = distance(moe(b, c, false), exact);
  EXPECT_LE(ours, 2 * plain + 1e-2);
}

TEST(ExpertFfn, SaturatedGatesStayFinite) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const MoeCase c{20, 16, 16, 2, 1, 1, 0};
    MoeInputs in = make_inputs(c, dtype, false), d = make_inputs(c, at::kDouble, false);
    for (MoeInputs* i : {&in, &d}) {
      at::NoGradGuard no_grad;
      for (auto& w : i->frozen.gate_FD) w.mul_(200);  // |gate| into the thousands
    }
    const at::Tensor y = moe(in, c, true), z = moe(d, c, false);
    y.sum().backward();
    z.sum().backward();
    EXPECT_LT(distance(y, z), 2e-2 * z.abs().max().item<double>());
    EXPECT_TRUE(at::isfinite(in.x.grad()).all().item<bool>());
    EXPECT_TRUE(at::isfinite(in.weights.grad()).all().item<bool>());
    if (dtype == at::kFloat) {
      EXPECT_LT(distance(in.x.grad(), d.x.grad()), 1e-3 * d.x.grad().abs().max().item<double>());
    }
  }
}

// Every shape must do: odd widths, ranks beside each other, several groups, one thread's worth and many chunks. bf16 is
// held against the plain path in bf16.
TEST(ExpertFfn, OddShapesInBothPrecisions) {
  for (const auto& c : std::vector<MoeCase>{{1, 1, 1, 1, 1, 1, 0},
                                            {33, 17, 31, 3, 2, 2, 0},
                                            {64, 65, 66, 2, 2, 3, 1},
                                            {1500, 40, 72, 2, 1, 2, 0},
                                            {300, 130, 33, 7, 4, 1, 2},
                                            {257, 64, 64, 1, 1, 2, 0}}) {
    MoeInputs f = make_inputs(c, at::kFloat, false), b = make_inputs(c, at::kBFloat16, false),
              p = make_inputs(c, at::kBFloat16, false), d = make_inputs(c, at::kDouble, false);
    // Masters stay float32, as in training; the reference rounds them where it uses them.
    const at::Tensor g = randn({c.T, c.D}, 30);
    for (MoeInputs* i : {&f, &d}) moe(*i, c, i == &f).backward(g.to(i->x.scalar_type()));
    moe(b, c, true).backward(g.to(at::kBFloat16));
    moe(p, c, false).backward(g.to(at::kBFloat16));
    for (size_t i = 0; i < f.leaves.size(); ++i) {
      const at::Tensor& exact = d.leaves[i].grad();
      const double scale = 1 + exact.abs().max().item<double>();
      EXPECT_LT(distance(f.leaves[i].grad(), exact), 1e-4 * scale) << "leaf " << i << " T " << c.T << " D " << c.D;
      EXPECT_LE(distance(b.leaves[i].grad(), exact), 2 * distance(p.leaves[i].grad(), exact) + 1e-2 * scale)
          << "leaf " << i << " T " << c.T << " D " << c.D;
    }
  }
}

TEST(Dispatch, SortsByExpertThenGroupStably) {
  const at::Tensor ids = at::tensor({1, 0, 1, 2, 0, 1}, at::kLong).view({3, 2}),
                   group = at::tensor({1, 0, 0}, at::kLong);
  const Dispatch d = make_dispatch(ids, 4, group, 2);
  EXPECT_EQ(d.host_offsets(), (std::vector<int64_t>{0, 1, 2, 4, 5, 6, 6, 6, 6}));
  // (0,text): t2; (0,image): t0; (1,text): t1, t2; (1,image): t0; (2,text): t1
  const std::vector<int64_t> tokens{2, 0, 1, 2, 0, 1};
  for (int64_t r = 0; r < 6; ++r) EXPECT_EQ(d.token_of_row_R[r].item<int32_t>(), tokens[r]);
}

TEST(Dispatch, SlotsWithoutAnExpertHaveNoRow) {
  const at::Tensor ids = at::tensor({1, -1, -1, 0, -1, -1}, at::kLong).view({3, 2});
  const Dispatch d = make_dispatch(ids, 2, {}, 1, 2);
  EXPECT_EQ(d.host_offsets(), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_TRUE(at::equal(d.token_of_row_R, at::tensor({1, 0}, at::kInt)));
  EXPECT_TRUE(at::equal(d.row_of_slot_TK, at::tensor({1, -1, -1, 0, -1, -1}, at::kInt).view({3, 2})));
  EXPECT_THROW(make_dispatch(ids, 2, {}, 1), InvariantError);
  EXPECT_THROW(make_dispatch(ids, 2, {}, 1, 3), InvariantError);
}

TEST(SumRows, AddsATokensRowsInOrder) {
  const at::Tensor places = at::tensor({2, 0, -1, -1, -1, -1, 1, -1, 2}, at::kInt).view({3, 3});
  const at::Tensor rows = at::tensor({1.0f, 2.0f, 10.0f, 20.0f, 100.0f, 200.0f}).view({3, 2}),
                   want = at::tensor({101.0f, 202.0f, 0.0f, 0.0f, 110.0f, 220.0f}).view({3, 2});
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf})
    EXPECT_TRUE(at::equal(sum_rows(rows.to(dtype), places), want.to(dtype))) << dtype;
  // Rounded once, after the sum: 1 + 2^-8 + 2^-8 is a bf16 number, 1 + 2^-8 is none.
  const at::Tensor parts = at::tensor({1.0f, 1.0f / 256, 1.0f / 256}).view({3, 1}).to(at::kBFloat16);
  EXPECT_EQ(sum_rows(parts, at::tensor({0, 1, 2}, at::kInt).view({1, 3})).item<float>(), 1.0f + 2.0f / 256);
  EXPECT_EQ(sum_rows(rows, at::empty({0, 3}, at::kInt)).sizes(), at::IntArrayRef({0, 2}));
  EXPECT_TRUE(at::equal(sum_rows(at::empty({0, 2}), at::full({4, 3}, -1, at::kInt)), at::zeros({4, 2})));
  EXPECT_THROW(sum_rows(rows, places.to(at::kLong)), InvariantError);
}

TEST(CrossEntropy, MatchesTheLibraryWithGradients) {
  for (const int64_t X : {1, 7, 300}) {
    at::Tensor h = randn({X, 12}, 1).set_requires_grad(true), w = randn({50, 12}, 2).set_requires_grad(true);
    at::Tensor hd = h.detach().to(at::kDouble).set_requires_grad(true),
               wd = w.detach().to(at::kDouble).set_requires_grad(true);
    const at::Tensor target = at::arange(X) % 50;
    const at::Tensor loss = linear_cross_entropy(h, w, target, 1.0 / double(X)),
                     exact = at::cross_entropy_loss(at::matmul(hd, wd.t()), target);
    EXPECT_NEAR(loss.item<double>(), exact.item<double>(), 1e-5);
    (loss * 2).backward();
    (exact * 2).backward();
    EXPECT_LT(distance(h.grad(), hd.grad()), 1e-5);
    EXPECT_LT(distance(w.grad(), wd.grad()), 1e-5);
  }
  // 200,000 classes: several chunks.
  const at::Tensor h = randn({100, 4}, 3), w = randn({200000, 4}, 4), target = at::arange(100);
  EXPECT_NEAR(linear_cross_entropy(h, w, target, 0.01).item<double>(),
              at::cross_entropy_loss(at::matmul(h, w.t()).to(at::kDouble), target).item<double>(), 1e-4);
}

// By block products where this process has them, else through ATen.
TEST(CrossEntropy, FrozenHeadMatches) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& [X, D, V] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 4, 5}, {37, 33, 1000}, {300, 64, 513}, {65, 16, 40000}}) {
      at::Tensor h = randn({X, D}, 1, dtype).set_requires_grad(true);
      const at::Tensor w = randn({V, D}, 2, dtype), target = (at::arange(X) * 7) % V;
      at::Tensor hd = h.detach().to(at::kDouble).set_requires_grad(true);
      const at::Tensor loss = linear_cross_entropy(h, pack_weight(w), target, 1.0 / double(X)),
                       exact = at::cross_entropy_loss(at::matmul(hd, w.to(at::kDouble).t()), target);
      EXPECT_NEAR(loss.item<double>(), exact.item<double>(), 2e-5 * (1 + exact.item<double>()));
      loss.backward();
      exact.backward();
      EXPECT_LT(distance(h.grad(), hd.grad()),
                (dtype == at::kFloat ? 1e-5 : 1e-2) * (1e-3 + hd.grad().abs().max().item<double>()))
          << X << " " << D << " " << V;
    }
}

TEST(FrozenLinear, SeveralWeightsMatchAutograd) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& [X, K] : std::vector<std::pair<int64_t, int64_t>>{{1, 3}, {33, 64}, {700, 50}}) {
      at::Tensor x = randn({X, K}, 1, dtype).set_requires_grad(true),
                 xd = x.detach().to(at::kDouble).set_requires_grad(true);
      std::vector<FrozenLinearWeight> weights;
      at::Tensor total = at::zeros({}, at::kDouble), exact = total.clone();
      std::vector<at::Tensor> expected;
      for (const int64_t N : {int64_t{5}, int64_t{130}}) {
        const at::Tensor w = randn({N, K}, uint64_t(N), dtype), b = N == 5 ? randn({N}, 9, dtype) : at::Tensor();
        weights.push_back({pack_weight(w), b});
        expected.push_back(at::matmul(xd, w.to(at::kDouble).t()));
        if (b.defined()) expected.back() = expected.back() + b.to(at::kDouble);
      }
      const auto y = frozen_linear(x, weights);
      for (size_t i = 0; i < y.size(); ++i) {
        const double scale = expected[i].abs().max().item<double>();
        EXPECT_LT(distance(y[i], expected[i]), (dtype == at::kFloat ? 1e-5 : 1e-2) * scale);
        const at::Tensor g = randn(y[i].sizes(), 40 + i);
        total = total + (y[i] * g.to(dtype)).to(at::kDouble).sum();
        exact = exact + (expected[i] * g.to(dtype).to(at::kDouble)).sum();
      }
      total.backward();
      exact.backward();
      EXPECT_LT(distance(x.grad(), xd.grad()),
                (dtype == at::kFloat ? 1e-5 : 1e-2) * xd.grad().abs().max().item<double>())
          << X << " " << K;
    }
}

TEST(ResidualNorm, ValuesAndGradientsMatchAutograd) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const bool also_float : {false, true})
      for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1}, {5, 7}, {33, 130}}) {
        at::Tensor x = randn(shape, 1).set_requires_grad(true), delta = randn(shape, 2, dtype).set_requires_grad(true),
                   w = randn({shape[1]}, 3).set_requires_grad(true);
        std::vector<at::Tensor> d;
        for (const auto& t : {x, delta, w}) d.push_back(t.detach().to(at::kDouble).set_requires_grad(true));
        const ResidualNorm r = residual_norm(x, delta, w, 1e-5, dtype, also_float);
        const at::Tensor sum = d[0] + d[1], y = plain_rms(sum, d[2], 1e-5);
        const double tolerance = dtype == at::kFloat ? 1e-5 : 2e-2;
        EXPECT_LT(distance(r.x_XD, sum), 1e-5);
        EXPECT_LT(distance(r.y_XD, y), tolerance * (1 + y.abs().max().item<double>()));
        if (also_float) { EXPECT_LT(distance(r.y_float_XD, y), 1e-5 * (1 + y.abs().max().item<double>())); }
        const at::Tensor gx = randn(shape, 4), gy = randn(shape, 5, dtype);
        at::Tensor loss = (r.x_XD * gx).sum() + (r.y_XD * gy).sum().to(at::kFloat),
                   exact = (sum * gx.to(at::kDouble)).sum() + (y * gy.to(at::kDouble)).sum();
        if (also_float) loss = loss + (r.y_float_XD * gx).sum(), exact = exact + (y * gx.to(at::kDouble)).sum();
        loss.backward();
        exact.backward();
        const std::vector<at::Tensor> leaves{x, delta, w};
        for (size_t i = 0; i < leaves.size(); ++i)
          EXPECT_LT(distance(leaves[i].grad(), d[i].grad()),
                    (i == 1 ? tolerance : 2e-5) * (1 + d[i].grad().abs().max().item<double>()))
              << "input " << i;
      }
}

}  // namespace
}  // namespace moegraft::kernels
