// The device kernels' arithmetic and indexing, run on the host: the functors of src/kernels/cuda with lanes as a loop
// (host_run.h) and the same host code around them, against plain ATen in double. Launches, barriers and threads at
// once: cuda_launch/; nvcc's code: check_ptx.py; a GPU: cuda_kernels_test.cpp.
#include <gtest/gtest.h>

#include "cuda_cases.h"

namespace moegraft::kernels::cuda {
namespace {

TEST(CudaLogic, ATeamAddsLikeAWarpAndABlock) {
  // 32 lanes meet in butterflies: every lane ends with the same bits, the pairwise tree's.
  std::vector<float> v(512);
  for (int i = 0; i < 512; ++i) v[i] = std::sin(float(i)) * float(1 << (i % 20));
  const auto warp = [&](int begin) {
    std::vector<float> w(v.begin() + begin, v.begin() + begin + 32);
    for (int half = 16; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) w[i] += w[i + half];
    return w[0];
  };
  EXPECT_EQ(HostTeam<32>().sum([&](int lane) { return v[lane]; }), warp(0));
  float block = warp(0);
  for (int w = 1; w < 16; ++w) block += warp(32 * w);
  EXPECT_EQ(HostTeam<512>().sum([&](int lane) { return v[lane]; }), block);
  EXPECT_EQ(HostTeam<512>().max([&](int lane) { return v[lane]; }), *std::max_element(v.begin(), v.end()));
  const Candidate best =
      HostTeam<32>().best([&](int lane) { return Candidate{float(lane % 7), lane % 2 ? lane : -1}; });
  EXPECT_EQ(best.index, 13);  // value 6 at the odd lanes 13, 27: the lower one
}

// ------------------------------------------------------------------------------------------------ dispatch

TEST(CudaLogic, DispatchIsTheStableSort) {
  for (const auto& c : kRoutings) {
    const auto [ids, group] = make_routing(c);
    const int64_t rows = rows_of(ids);
    const Dispatch d = Host::make_dispatch(ids, c.E, group, c.groups, rows);
    const at::Tensor bucket = (ids * c.groups + group.unsqueeze(1)).masked_fill(ids.lt(0), c.E * c.groups).view({-1});
    const at::Tensor order = std::get<1>(at::sort(bucket, /*stable=*/true, -1, false)).narrow(0, 0, rows);
    EXPECT_TRUE(at::equal(d.token_of_row_R.to(at::kLong), order.div(c.K, "floor"))) << c.T;
    const at::Tensor inverse = at::full({c.T * c.K}, -1, at::kLong);
    inverse.index_put_({order}, at::arange(rows));
    EXPECT_TRUE(at::equal(d.row_of_slot_TK.to(at::kLong).view({-1}), inverse)) << c.T;
    const at::Tensor counts = at::bincount(bucket, {}, c.E * c.groups + 1).narrow(0, 0, c.E * c.groups);
    EXPECT_TRUE(at::equal(d.offsets.to(at::kLong), at::cat({at::zeros({1}, at::kLong), counts.cumsum(0)}))) << c.T;
  }
}

TEST(CudaLogic, DispatchOfBadIdsStaysInItsMemory) {
  const Dispatch d =
      Host::make_dispatch(at::tensor({0, 99, 1}, at::kLong).view({3, 1}), 2, at::tensor({7, -1, 0}, at::kLong), 2);
  EXPECT_TRUE(at::equal(d.offsets, at::tensor({0, 0, 1, 3, 3}, at::kInt)));
}

TEST(CudaLogic, RowBitsFollowTheGroups) {
  const at::Tensor offsets = at::tensor({0, 2, 2, 2, 5, 5, 6}, at::kInt),
                   bits = at::zeros({6}, at::kInt);  // 3 experts, 2 groups; empty buckets between
  RowBits f{offsets.const_data_ptr<int32_t>(), 6, 2, {1u, 6u}, reinterpret_cast<uint32_t*>(bits.data_ptr<int32_t>())};
  OnHost::threads(f, 6);
  EXPECT_TRUE(at::equal(bits, at::tensor({1, 1, 6, 6, 6, 6}, at::kInt)));
}

// ------------------------------------------------------------------------------------------------ router

TEST(CudaLogic, RouteMatchesSoftmaxAndTopK) {
  struct Case {
    int64_t T, E, K;
  };
  for (const auto& c :
       std::vector<Case>{{1, 1, 1}, {3, 5, 5}, {9, 8, 2}, {20, 33, 4}, {17, 128, 8}, {5, 512, 16}, {3, 600, 32}})
    for (const bool renormalise : {false, true}) {
      const at::Tensor logits = randn({c.T, c.E}, 1) * 3;
      const Route r = Host::route_forward(logits, c.K, renormalise);
      at::Tensor exact = wide(logits);
      const at::Tensor probs = at::softmax(exact, -1);
      EXPECT_LT(distance(r.probs_TE, probs), 1e-6);
      EXPECT_TRUE(at::equal(r.topk_ids_TK, std::get<1>(at::topk(probs, c.K, -1)))) << "E " << c.E;
      at::Tensor weights = probs.gather(1, r.topk_ids_TK);
      if (renormalise) weights = weights / weights.sum(-1, true);
      EXPECT_LT(distance(r.topk_weights_TK, weights), 1e-6);

      const at::Tensor dw = randn({c.T, c.K}, 2), dp = randn({c.T, c.E}, 3);
      for (const int which : {1, 2, 3}) {
        const at::Tensor loss = (which & 1 ? (weights * dw).sum() : at::zeros({}, at::kDouble)) +
                                (which & 2 ? (probs * dp).sum() : at::zeros({}, at::kDouble));
        const at::Tensor g = torch::autograd::grad({loss}, {exact}, {}, true)[0];
        EXPECT_LT(
            distance(Host::route_backward(r, which & 1 ? dw : at::Tensor(), which & 2 ? dp : at::Tensor(), renormalise),
                     g),
            2e-6 * (1 + largest(g)))
            << "E " << c.E << " part " << which;
      }
    }
}

TEST(CudaLogic, RouteBreaksTiesDownwardsAndKeepsIdsInRange) {
  const Route tie = Host::route_forward(at::tensor({1.f, 2.f, 2.f, 2.f, 0.f}).view({1, 5}), 3, false);
  EXPECT_TRUE(at::equal(tie.topk_ids_TK, at::tensor({1, 2, 3}, at::kLong).view({1, 3})));
  const Route underflow =
      Host::route_forward(at::tensor({0.f, -1e4f, -1e4f}).view({1, 3}), 3, true);  // probabilities 1, 0, 0
  EXPECT_TRUE(at::equal(underflow.topk_ids_TK, at::tensor({0, 1, 2}, at::kLong).view({1, 3})));
  EXPECT_TRUE(at::equal(underflow.topk_weights_TK, at::tensor({1.f, 0.f, 0.f}).view({1, 3})));
  const Route nan = Host::route_forward(at::full({2, 4}, NAN), 2, true);
  EXPECT_TRUE(at::equal(nan.topk_ids_TK, at::tensor({0, 1, 0, 1}, at::kLong).view({2, 2})));
  EXPECT_TRUE(nan.topk_weights_TK.isnan().all().item<bool>());
}

// ------------------------------------------------------------------------------------------------ norm, rotary

TEST(CudaLogic, RoutingSumsAreTheHostsAndCountsExact) {
  for (const auto& [T, E, K, M] : {std::tuple(1, 4, 2, 1), std::tuple(5, 1, 1, 2), std::tuple(33, 7, 1, 2),
                                   std::tuple(64, 130, 8, 3), std::tuple(700, 64, 8, 2)}) {
    const Route r = Host::route_forward(randn({T, E}, 11) * 2, K, true);
    const at::Tensor modality = at::arange(T, at::kLong) * 5 % 7 % M, once = at::zeros({M, 2 * E + 3}, at::kDouble),
                     expected = at::zeros_like(once);
    Host::add_routing_sums(once, r.probs_TE, r.topk_ids_TK, M > 1 ? modality : at::Tensor());
    kernels::add_routing_sums(expected, r.probs_TE, r.topk_ids_TK, modality);
    EXPECT_TRUE(at::equal(once.narrow(1, 0, E), expected.narrow(1, 0, E))) << T << " tokens: selections";
    EXPECT_TRUE(at::equal(once.select(1, 2 * E), expected.select(1, 2 * E))) << T << " tokens";
    EXPECT_LT(distance(once, expected), 2e-6 * double(T) + 1e-6)
        << T << " tokens, " << E << " experts";  // float32 sums of up to T values below 1
    Host::add_routing_sums(once, r.probs_TE, r.topk_ids_TK, M > 1 ? modality : at::Tensor());
    EXPECT_LT(distance(once, expected * 2), 4e-6 * double(T) + 2e-6) << "calls add up";
  }
  // Certain and uniform routers have closed forms; a probability of 0 has no entropy.
  const at::Tensor probs = at::tensor({1.0f, 0.0f, 0.0f, 0.0f, 0.25f, 0.25f, 0.25f, 0.25f}).view({2, 4}),
                   ids = at::tensor({0, 1, 0, 1}, at::kLong).view({2, 2}), sums = at::zeros({2, 11}, at::kDouble);
  Host::add_routing_sums(sums, probs, ids, at::tensor({0, 1}, at::kLong));
  EXPECT_LT(distance(sums, at::tensor({1.0, 1.0, 0.0, 0.0, 1.0,  0.0,  0.0,  0.0,  1.0, 0.0, 1.0,
                                       1.0, 1.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 0.0},
                                      at::kDouble)
                               .view({2, 11})),
            1e-7);
}

TEST(CudaLogic, AddedRowsAreRoundedOnceAndOthersUntouched) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t width : {8, 24, 5}) {
      const at::Tensor from = randn({4, width}, 3, dtype), rows = at::tensor({6, 0, 3, 2}, at::kLong),
                       to = randn({7, width}, 4, dtype), before = to.clone();
      Host::add_rows(from, rows, to,
                     2.0);  // a power of two: whether the product is fused with the sum makes no difference
      const at::Tensor expected = before.clone();
      expected.index_copy_(0, rows,
                           (before.index_select(0, rows).to(at::kFloat) + 2.0f * from.to(at::kFloat)).to(dtype));
      EXPECT_TRUE(at::equal(to, expected));
      Host::add_rows(at::empty({0, width}, from.options()), at::empty({0}, at::kLong), to);
      EXPECT_TRUE(at::equal(to, expected));
    }
}

TEST(CudaLogic, RmsNormMatchesAutograd) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1}, {5, 7}, {3, 4, 24}, {133, 192}, {2, 2056}, {0, 8}})
    for (const bool residual : {false, true}) {
      const at::Tensor x = randn(shape, 1), delta = residual ? randn(shape, 4) : at::Tensor(),
                       w = randn({shape.back()}, 2), d = randn(shape, 3), d2 = randn(shape, 5), ds = randn(shape, 6);
      at::Tensor xd = wide(x), wd = wide(w);
      const at::Tensor sum = residual ? xd + delta.to(at::kDouble) : xd,
                       exact = wd * (sum * at::rsqrt(sum.square().mean(-1, true) + 1e-5));
      const Norm n = Host::rms_norm_forward(x, delta, w, 1e-5, at::kFloat, true);
      EXPECT_LT(distance(n.y, exact), 1e-5);
      EXPECT_TRUE(at::equal(n.y, n.y_wide));
      EXPECT_TRUE(residual ? distance(n.sum, sum) < 1e-6 : n.sum.is_same(x));
      const auto g = torch::autograd::grad({(exact * (d + d2)).sum() + (sum * ds).sum()}, {xd, wd});
      const NormGradients ours = Host::rms_norm_backward(d, d2, ds, n.sum, w, n.rstd, true);
      EXPECT_LT(distance(ours.dx, g[0]), 2e-5 * (1 + largest(g[0])));
      EXPECT_LT(distance(ours.dw, g[1]), 1e-4);
      const NormGradients only_wide = Host::rms_norm_backward({}, d + d2, ds, n.sum, w, n.rstd, false);
      EXPECT_LT(distance(only_wide.dx, g[0]), 2e-5 * (1 + largest(g[0])));
      EXPECT_FALSE(only_wide.dw.defined());
    }
}

TEST(CudaLogic, RmsNormRoundsWhereTheReferenceDoes) {
  const at::Tensor x = randn({64, 192}, 1), w = randn({192}, 2), xb = x.to(at::kBFloat16), wb = w.to(at::kBFloat16);
  // bf16 throughout: the normalised value is rounded, then the product.
  const at::Tensor xf = xb.to(at::kFloat),
                   normed = (xf * at::rsqrt(xf.square().mean(-1, true) + 1e-5)).to(at::kBFloat16);
  const double off = (Host::rms_norm_forward(xb, {}, wb, 1e-5, at::kBFloat16, false).y != wb * normed)
                         .to(at::kFloat)
                         .mean()
                         .item<double>();
  EXPECT_LT(off, 0.01);  // a last bit of float32 may tip a rounding
  // float32 residual stream, bf16 out: one rounding at the end; the wide output has none.
  const Norm mixed = Host::rms_norm_forward(x, xb, w, 1e-5, at::kBFloat16, true);
  EXPECT_EQ(mixed.y.scalar_type(), at::kBFloat16);
  EXPECT_EQ(mixed.sum.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(mixed.y, mixed.y_wide.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(mixed.sum, x + xb.to(at::kFloat)));
  const NormGradients g = Host::rms_norm_backward(xb, x, {}, mixed.sum, w, mixed.rstd, true),
                      both = Host::rms_norm_backward({}, xb.to(at::kFloat) + x, {}, mixed.sum, w, mixed.rstd, true);
  EXPECT_TRUE(at::equal(g.dx, both.dx));
  EXPECT_TRUE(at::equal(g.dw, both.dw));
}

TEST(CudaLogic, RmsNormDoesNotDependOnWhereItsInputsLie) {
  const at::Tensor x = randn({5, 200}, 1), w = randn({200}, 2), d = randn({5, 200}, 3);
  const auto moved = [](const at::Tensor& t) {  // off 16 bytes, as in a mapped file
    const at::Tensor room = at::empty({t.numel() + 1}, t.options()),
                     view = room.narrow(0, 1, t.numel()).view(t.sizes());
    return view.copy_(t);
  };
  const Norm a = Host::rms_norm_forward(x, d, w, 1e-5, at::kFloat, false),
             b = Host::rms_norm_forward(moved(x), moved(d), moved(w), 1e-5, at::kFloat, false);
  EXPECT_TRUE(at::equal(a.y, b.y) && at::equal(a.rstd, b.rstd));
  EXPECT_TRUE(at::equal(Host::rms_norm_backward(d, {}, {}, a.sum, w, a.rstd, false).dx,
                        Host::rms_norm_backward(moved(d), {}, {}, moved(a.sum), moved(w), a.rstd, false).dx));
}

TEST(CudaLogic, RotaryIsTheComplexRotationAndItsInverse) {
  for (const int64_t C : {2, 6, 16, 128}) {
    const int64_t T = 9, H = 3;
    const at::Tensor joint = randn({T, 2 * H, C}, 4), x = joint.narrow(1, H, H),
                     angle = randn({T, C / 2}, 5);  // a slice of a joint projection
    const at::Tensor y = Host::rotary(x, angle.cos(), angle.sin(), 1);
    const at::Tensor z = at::complex(x.narrow(2, 0, C / 2).contiguous(), x.narrow(2, C / 2, C / 2).contiguous()) *
                         at::polar(at::ones_like(angle), angle).unsqueeze(1);
    EXPECT_LT(distance(y, at::cat({at::real(z), at::imag(z)}, 2)), 1e-5);
    EXPECT_LT(distance(Host::rotary(y, angle.cos(), angle.sin(), -1), x), 1e-5);
    const at::Tensor low = x.to(at::kBFloat16);
    EXPECT_TRUE(at::equal(Host::rotary(low, angle.cos(), angle.sin(), 1),
                          Host::rotary(low.to(at::kFloat), angle.cos(), angle.sin(), 1).to(at::kBFloat16)));
  }
}

// ------------------------------------------------------------------------------------------------ swiglu, loss

TEST(CudaLogic, SwigluMatchesAutograd) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1}, {5, 13}, {9, 264}, {0, 8}}) {
    const at::Tensor g = randn(shape, 1) * 3, u = randn(shape, 2), d = randn(shape, 3);
    at::Tensor gd = wide(g), ud = wide(u);
    const at::Tensor exact = at::silu(gd) * ud;
    EXPECT_LT(distance(Host::swiglu_forward(g, u), exact), 1e-6 * (1 + largest(exact)));
    const auto grads = torch::autograd::grad({exact}, {gd, ud}, {d.to(at::kDouble)});
    const auto [dg, du] = Host::swiglu_backward(d, g, u);
    EXPECT_LT(distance(dg, grads[0]), 2e-6 * (1 + largest(grads[0])));
    EXPECT_LT(distance(du, grads[1]), 2e-6 * (1 + largest(grads[1])));
  }
  const at::Tensor far = at::tensor({-200.f, 200.f}).view({1, 2}), one = at::ones({1, 2});  // no overflow at the ends
  EXPECT_TRUE(at::equal(Host::swiglu_forward(far, one), at::tensor({-0.f, 200.f}).view({1, 2})));
  EXPECT_TRUE(at::equal(Host::swiglu_backward(one, far, one).first, at::tensor({0.f, 1.f}).view({1, 2})));
}

TEST(CudaLogic, CrossEntropyRowsMatchAutograd) {
  for (const int64_t V : {1, 5, 512, 1000, 5003}) {
    const at::Tensor logits = randn({7, V}, 1) * 4, targets = at::arange(7) * 13 % V;
    at::Tensor exact = wide(logits);
    const at::Tensor nll = at::cross_entropy_loss(exact, targets, {}, at::Reduction::None);
    const at::Tensor g = torch::autograd::grad({nll.sum() * 0.25}, {exact})[0];
    EXPECT_LT(distance(Host::cross_entropy_rows(logits, targets, 0.25, {}), nll), 2e-5);
    const at::Tensor d16 = at::empty(logits.sizes(), at::kBFloat16);
    Host::cross_entropy_rows(logits, targets, 0.25, d16);
    EXPECT_LT(distance(d16, g), 2e-3 * (1e-3 + largest(g)));
    EXPECT_LT(distance(Host::cross_entropy_rows(logits, targets, 0.25, logits), nll), 2e-5);  // in place
    EXPECT_LT(distance(logits, g), 1e-6);
  }
}

TEST(CudaLogic, CrossEntropyFollowsALogitThatKeepsGrowingAndSkipsExcludedClasses) {
  const int64_t V = 9001;
  const float inf = INFINITY;
  at::Tensor logits = randn({6, V}, 2);
  logits[0] = at::arange(V).to(at::kFloat) * 0.05;     // a larger one in every pack
  logits[1] = at::arange(V).flip({0}).to(at::kFloat);  // the largest first, 9000 above the last
  logits[2].narrow(0, 0, V - 1).fill_(-inf);           // one class only, at the end of a pack
  logits[3].narrow(0, 8, V - 16).fill_(-inf);          // whole lanes without a number
  logits[4] = logits[4] * 30 - 1e4;
  const at::Tensor targets = at::tensor({V - 1, int64_t{0}, V - 1, int64_t{3}, int64_t{4000}, int64_t{17}}, at::kLong);
  at::Tensor exact = wide(logits);
  const at::Tensor nll = at::logsumexp(exact, {1}) - exact.gather(1, targets.unsqueeze(1)).squeeze(1),
                   p = at::softmax(exact, 1).detach();
  const at::Tensor g = p.scatter_add(1, targets.unsqueeze(1), at::full({6, 1}, -1.0, at::kDouble)) * 0.5,
                   d = at::empty_like(logits);
  const at::Tensor ours = Host::cross_entropy_rows(logits, targets, 0.5, d);
  EXPECT_LT(((ours - nll).abs() / (1 + nll.abs())).max().item<double>(), 1e-6);
  EXPECT_LT(distance(d, g), 1e-6);
  EXPECT_EQ(largest(d.masked_select(logits == -inf)), 0.0) << "excluded classes have no gradient";

  // What is no probability must not look like one.
  at::Tensor bad = randn({3, 100}, 3);
  bad[0][7] = NAN;
  bad[1][99] = inf;
  bad[2].fill_(-inf);
  const at::Tensor db = at::empty_like(bad);
  EXPECT_TRUE(Host::cross_entropy_rows(bad, at::zeros({3}, at::kLong), 1, db).isnan().all().item<bool>());
  EXPECT_TRUE(db.isnan().any(1).all().item<bool>());
}

TEST(CudaLogic, ChunksOfTheLossAreWholeTilesOnAGpu) {
  EXPECT_EQ(cross_entropy_chunk(4096, 151936, true), 1536);  // three, of 1536, 1536 and 1024
  EXPECT_EQ(cross_entropy_chunk(2000, 151936, true), 1024);  // two of about one size
  EXPECT_EQ(cross_entropy_chunk(100, 151936, true), 256);
  EXPECT_EQ(cross_entropy_chunk(8192, 300, true), 8192);
  EXPECT_EQ(cross_entropy_chunk(8192, int64_t{1} << 22, true), 256);  // never less than a tile
  EXPECT_EQ(cross_entropy_chunk(0, 0, true), 256);
  for (const int64_t V : {1000, 32000, 151936, 262144})
    for (const int64_t rows : {1, 255, 257, 1766, 4097, 65536}) {
      const int64_t chunk = cross_entropy_chunk(rows, V, true);
      EXPECT_EQ(chunk % 256, 0);
      EXPECT_LE(chunk * V, int64_t{1} << 28);
    }
  EXPECT_EQ(cross_entropy_chunk(4096, 151936, false), (int64_t{1} << 23) / 151936);
}

// ------------------------------------------------------------------------------------------------ experts

TEST(CudaLogic, ExpertsMatchTheDefinitionInFloat32) {
  for (const Layout layout : {Layout::stacked, Layout::joined, Layout::scattered})
    for (const auto& c : kMoeCases) {
      const MoeInputs f = make_moe(c, at::kFloat, at::kFloat, layout),
                      d = make_moe(c, at::kDouble, at::kDouble, layout);
      const at::Tensor dout = randn({c.routing.T, c.D}, 30);
      at::Tensor exact;
      const auto expected = exact_gradients(d, dout, exact);
      const MoeLayer<OnHost> layer(f.problem);
      const MoeForward y = layer.forward(true, true);
      EXPECT_LT(distance(y.out_XD, exact), 1e-5 * (1 + largest(exact))) << "T " << c.routing.T;
      EXPECT_EQ(y.hidden_RF.sizes(), (std::vector<int64_t>{f.problem.dispatch.num_rows(), c.F}));
      const auto ours = flat(layer.backward(y.saved, dout, all_needs(f.problem)));
      ASSERT_EQ(ours.size(), expected.size());
      for (size_t i = 0; i < ours.size(); ++i) {
        const at::Tensor e = expected[i].defined() ? expected[i] : at::zeros_like(d.leaves[i]);
        EXPECT_LT(distance(ours[i], e), 1e-5 * (1 + largest(e)))
            << "leaf " << i << ", T " << c.routing.T << ", layout " << int(layout);
      }
    }
}

TEST(CudaLogic, ExpertsInBfloat16AreNoWorseThanPlain) {
  const MoeCase c{{200, 8, 2, 2, 0}, 64, 48, 8};
  const MoeInputs b = make_moe(c, at::kBFloat16, at::kFloat, Layout::joined),
                  d = make_moe(c, at::kDouble, at::kDouble, Layout::stacked),
                  p = make_moe(c, at::kBFloat16, at::kBFloat16, Layout::stacked);
  const at::Tensor dout = randn({c.routing.T, c.D}, 30).to(at::kBFloat16);
  at::Tensor exact, plain;
  const auto expected = exact_gradients(d, dout, exact);
  const auto plain_grads = exact_gradients(p, dout, plain);
  const MoeLayer<OnHost> layer(b.problem);
  const MoeForward y = layer.forward(true, false);
  EXPECT_EQ(y.out_XD.scalar_type(), at::kBFloat16);
  EXPECT_LE(distance(y.out_XD, exact), 2 * distance(plain, exact) + 1e-3);
  const auto ours = flat(layer.backward(y.saved, dout, all_needs(b.problem)));
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_EQ(ours[i].scalar_type(), b.leaves[i].scalar_type()) << i;
    EXPECT_LE(distance(ours[i], expected[i]), 2 * distance(plain_grads[i], expected[i]) + 1e-3) << "leaf " << i;
  }
}

TEST(CudaLogic, RowsOnWhichNothingActsKeepTheBaseBits) {
  const MoeCase c{{120, 4, 2, 2, 2}, 16, 8, 3};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    MoeInputs in = make_moe(c, dtype, at::kFloat, Layout::stacked);
    in.problem.terms[kUp].pop_back();  // the one that acts everywhere
    MoeInputs base = in;
    base.problem.terms = {};
    const at::Tensor text = make_routing(c.routing).second == 0;
    const at::Tensor a = MoeLayer<OnHost>(in.problem).forward(true, false).out_XD,
                     b = MoeLayer<OnHost>(base.problem).forward(true, false).out_XD;
    EXPECT_TRUE(at::equal(a.index({text}), b.index({text})));
    EXPECT_FALSE(at::equal(a, b));
  }
}

TEST(CudaLogic, WhatDoesNotActIsNotRead) {
  // NaN where nothing may look: deltas of rows on which no term acts, and a product's leavings for an expert without
  // rows.
  const float nan = NAN;
  const at::Tensor bits = at::tensor({1, 2, 0}, at::kInt), rows = at::arange(3).to(at::kInt).view({3, 1}),
                   y = randn({3, 8}, 1), ones = at::ones({3, 1});
  at::Tensor delta = at::full({3, 8}, nan);
  delta[0] = 1;
  const at::Tensor sum = Host::combine_sum(y, {}, delta, bits, 1, ones, rows);
  EXPECT_TRUE(at::equal(sum[0], y[0] + 1) && at::equal(sum.narrow(0, 1, 2), y.narrow(0, 1, 2)));

  at::Tensor g = y.clone(), u = y.clone(), h = at::empty_like(y), delta_u = at::full({3, 8}, nan);
  delta_u[1] = 2;
  const auto* bit = Host::bits(bits);
  OnHost::threads(SwigluForward<float, 8>{out<float>(g), out<float>(u), 8, 8, in<float>(delta), in<float>(delta_u), 8,
                                          bit, 1, 2, out<float>(h), 8},
                  3);
  EXPECT_TRUE(at::equal(g[0], y[0] + 1) && at::equal(g.narrow(0, 1, 2), y.narrow(0, 1, 2)) &&
              at::equal(u[1], y[1] + 2) && at::equal(u[0], y[0]) && at::equal(u[2], y[2]));
  EXPECT_LT(distance(h, at::silu(g) * u), 1e-6);

  const at::Tensor dg = at::empty_like(y), du = at::empty_like(y);
  OnHost::rows(SwigluBackward<float, 8>{in<float>(y), in<float>(delta), bit, 1, in<float>(y), in<float>(y), 8, 8,
                                        nullptr, out<float>(dg), out<float>(du), 8, nullptr, nullptr, 8},
               3);
  EXPECT_FALSE(at::cat({dg, du}).isnan().any().item<bool>());

  const at::Tensor left = at::full({2, 3, 8}, nan), offsets = at::tensor({0, 3, 3}, at::kInt),
                   to = at::empty({2, 3, 8});
  left[0] = 2;
  const at::Tensor expected = at::cat({at::full({1, 3, 8}, 3.f), at::zeros({1, 3, 8})});
  OnHost::threads(
      FactorGradient<float, float, 1>{in<float>(left), 24, 8, out<float>(to), 3, 8, 1, in<int32_t>(offsets), 1.5f}, 48);
  EXPECT_TRUE(at::equal(to, expected));
  OnHost::threads(FactorGradient<float, float, 8>{in<float>(left), 24, 8, out<float>(to.fill_(NAN)), 3, 8, 1,
                                                  in<int32_t>(offsets), 1.5f},
                  6);
  EXPECT_TRUE(at::equal(to, expected));
}

TEST(CudaLogic, AnIdleExpertHasExactlyZeroGradientAndOnlyNeededOnesAreMade) {
  const MoeCase c{{40, 4, 2, 2, 2}, 16, 8, 3};  // expert 3 is never selected
  const MoeInputs in = make_moe(c, at::kBFloat16, at::kFloat, Layout::stacked);
  const MoeLayer<OnHost> layer(in.problem);
  const MoeForward y = layer.forward(true, false);
  MoeNeeds needs = all_needs(in.problem);
  const MoeGradients all = layer.backward(y.saved, at::ones_like(in.problem.x_XD), needs);
  for (const auto& [A, B] : all.factors[kDown]) {
    EXPECT_EQ(largest(A[3].to(at::kDouble)), 0.0);
    EXPECT_EQ(largest(B[3].to(at::kDouble)), 0.0);
    EXPECT_GT(largest(A[0].to(at::kDouble)), 0.0);
  }
  needs.x = needs.weights = false;
  needs.factors[kDown] = {false};
  needs.factors[kUp] = {false, true};
  const MoeGradients some = layer.backward(y.saved, at::ones_like(in.problem.x_XD), needs);
  EXPECT_FALSE(some.x_XD.defined() || some.weights_XK.defined() || some.factors[kDown][0].first.defined() ||
               some.factors[kUp][0].first.defined());
  EXPECT_TRUE(some.factors[kUp][1].second.defined() && some.factors[kGate][0].first.defined());
}

// Factors of whole packs are written once: nothing is filled with zeros first (17 MB a call at 128 experts, rank 16).
TEST(CudaLogic, OnlyPaddedRanksAreFilledWithZeros) {
  for (const int64_t rank : {3, 8}) {
    const MoeCase c{{40, 4, 2, 2, 0}, 16, 8, rank};
    MoeInputs in = make_moe(c, at::kBFloat16, at::kFloat, Layout::joined);
    in.problem.terms[kUp].pop_back();  // of rank + 1
    const MoeLayer<OnHost> layer(in.problem);
    const auto filled = [&] {
      static int64_t fills;
      fills = 0;
      const auto handle = at::addThreadLocalCallback(
          at::RecordFunctionCallback([](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
            fills += std::string(f.name()) == "aten::zeros";
            return nullptr;
          }));
      const MoeForward y = layer.forward(true, false);
      layer.backward(y.saved, at::ones_like(in.problem.x_XD), all_needs(in.problem));
      at::removeCallback(handle);
      return fills;
    };
    EXPECT_EQ(filled() > 0, rank % 8 != 0) << "rank " << rank;
  }
}

TEST(CudaLogic, WithoutTermsOnlyActivationsAndWeightsGetGradients) {
  const MoeCase c{{33, 4, 2, 1, 0}, 8, 16, 4};
  MoeInputs f = make_moe(c, at::kFloat, at::kFloat, Layout::joined),
            d = make_moe(c, at::kDouble, at::kDouble, Layout::joined);
  f.problem.terms = d.problem.terms = {};
  f.leaves.resize(2);
  d.leaves.resize(2);
  const at::Tensor dout = randn({33, 8}, 30);
  at::Tensor exact;
  const auto expected = exact_gradients(d, dout, exact);
  const MoeLayer<OnHost> layer(f.problem);
  const MoeForward y = layer.forward(true, false);
  EXPECT_EQ(y.saved.size(), 2u);
  const MoeGradients g = layer.backward(y.saved, dout, all_needs(f.problem));
  EXPECT_LT(distance(y.out_XD, exact), 1e-5);
  EXPECT_LT(distance(g.x_XD, expected[0]), 1e-4);
  EXPECT_LT(distance(g.weights_XK, expected[1]), 1e-4);
}

TEST(CudaLogic, ExpertsInOneStorageAreViewedNotCopied) {
  const at::Tensor all = randn({3, 2, 8, 4}, 1);  // E, {gate, up}, F, D
  std::vector<at::Tensor> gate, up, loose;
  for (int64_t e = 0; e < 3; ++e) {
    gate.push_back(all[e][0]);
    up.push_back(all[e][1]);
    loose.push_back(all[e][0].clone());
  }
  const at::Tensor g = stacked(gate), u = stacked(up), both = joined_view(g, u);
  EXPECT_TRUE(g.is_alias_of(all) && u.is_alias_of(all) && both.is_alias_of(all));
  EXPECT_TRUE(at::equal(both, all.view({3, 16, 4})));
  EXPECT_TRUE(at::equal(u, all.select(1, 1)));
  EXPECT_TRUE(at::equal(stacked(loose), g));
  EXPECT_FALSE(joined_view(stacked(loose), u).defined());
  EXPECT_FALSE(joined_view(u, g).defined());
  const std::vector<at::Tensor> mixed{gate[0], all.clone()[1][0], gate[2]};  // the right distances, in two storages
  EXPECT_FALSE(stacked_view(mixed).defined());
  std::swap(gate[0], gate[2]);  // equally spaced, but backwards
  EXPECT_TRUE(at::equal(stacked(gate), all.select(1, 0).flip({0})));
}

TEST(ExpertMatrices, CopiesShareTheListAndItsView) {
  const at::Tensor all = randn({3, 8, 4}, 1);
  ExpertMatrices one = all.unbind(0), other = one;
  EXPECT_EQ(&one.list(), &other.list());
  EXPECT_TRUE(at::equal(one.stacked(), all) && one.stacked().is_alias_of(all));
  EXPECT_TRUE(one.stacked().is_same(other.stacked())) << "looked for once";
  other.own()[1] = all[1].clone();
  EXPECT_FALSE(other.stacked().defined());
  EXPECT_TRUE(one.stacked().is_same(ExpertMatrices(one).stacked()) && one[1].is_alias_of(all))
      << "the other's change is its own";
  one.push_back(all[2]);
  EXPECT_FALSE(one.stacked().defined()) << "the view of three is no view of four";
  EXPECT_EQ(one.size(), 4u);
  EXPECT_TRUE(ExpertMatrices().empty() && !ExpertMatrices().stacked().defined());
}

TEST(CudaLogic, JoinedExpertsAreOneTensorOfTheSameValues) {
  ExpertMatrices gate, up, down;
  for (int64_t e = 0; e < 3; ++e) {
    gate.push_back(randn({8, 4}, 10 + e));
    up.push_back(randn({8, 4}, 20 + e));
    down.push_back(randn({4, 8}, 30 + e));
  }
  const std::vector<at::Tensor> before[3]{gate.list(), up.list(), down.list()};
  EXPECT_FALSE(stacked_view(gate).defined());
  join_experts(gate, up, down);
  ASSERT_TRUE(stacked_view(gate).defined() && stacked_view(up).defined() && stacked_view(down).defined());
  const at::Tensor both = joined_view(stacked_view(gate), stacked_view(up));
  ASSERT_TRUE(both.defined());
  EXPECT_TRUE(at::equal(both, at::cat({at::stack(before[0]), at::stack(before[1])}, 1)));
  EXPECT_TRUE(at::equal(stacked_view(down), at::stack(before[2])));
  const void *where = gate[1].data_ptr(), *where_down = down[1].data_ptr();
  join_experts(gate, up, down);  // nothing left to do
  EXPECT_TRUE(gate[1].data_ptr() == where && down[1].data_ptr() == where_down);
}

}  // namespace
}  // namespace moegraft::kernels::cuda
