// The 8-bit AdamW step: the map, rounding to it, and the update against float32 arithmetic composed of ATen operations.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/optimizer.h"

namespace moegraft::kernels {
namespace {

constexpr DynamicMap kMaps[] = {DynamicMap::with_sign, DynamicMap::without_sign};

at::Tensor map_tensor(DynamicMap map) { return at::tensor(at::ArrayRef<float>(dynamic_map(map).data(), 256)); }

// Lower ends of the bins, ascending, and of the number 1 (half way between the last centre and 1); in double.
std::vector<double> edges(DynamicMap map) {
  std::vector<double> e;
  double top = 1e-6;
  for (int i = 0; i < 7; ++i, top *= 10) {
    const int n = map == DynamicMap::with_sign ? 1 << i : 2 << i;
    for (int k = 0; k < n; ++k) e.push_back(top * (0.1 + 0.9 * k / n));
    if (i == 6) e.push_back(1 - 0.225 / n);
  }
  return e;
}

TEST(DynamicMap, HasItsKnownNumbers) {
  for (const auto map : kMaps) {
    const auto& v = dynamic_map(map);
    for (int c = 1; c < 256; ++c) EXPECT_LT(v[c - 1], v[c]) << c;
    EXPECT_EQ(v[255], 1.0f);
  }
  const auto &s = dynamic_map(DynamicMap::with_sign), &u = dynamic_map(DynamicMap::without_sign);
  EXPECT_EQ(s[127], 0.0f);
  EXPECT_EQ(u[0], 0.0f);
  for (int i = 1; i <= 127; ++i) EXPECT_EQ(s[127 - i], -s[127 + i]);
  // Seven decades of 1, 2, 4, … bins (signed) and 2, 4, 8, … (unsigned): centres by hand.
  const auto expect = [](float got, double want) { EXPECT_NEAR(got, want, 1e-6 * want); };
  expect(s[128], 0.55e-6);
  expect(s[129], 0.325e-5), expect(s[130], 0.775e-5);
  expect(s[131], 0.2125e-4), expect(s[134], 0.8875e-4);
  expect(s[191], 0.1 + 0.45 / 64), expect(s[254], 1 - 0.45 / 64);
  expect(u[1], 0.325e-6), expect(u[2], 0.775e-6);
  expect(u[3], 0.2125e-5), expect(u[6], 0.8875e-5);
  expect(u[127], 0.1 + 0.45 / 128), expect(u[254], 1 - 0.45 / 128);
}

TEST(Quantize8, KeepsTheMapsOwnNumbers) {
  for (const auto map : kMaps) {
    const auto q = quantize8(map_tensor(map), map);
    EXPECT_TRUE(at::equal(q.codes.to(at::kLong), at::arange(256))) << q.codes;
    EXPECT_EQ(q.scales.item<float>(), 1.0f);
    EXPECT_TRUE(at::equal(dequantize8(q, map), map_tensor(map)));
  }
}

TEST(Quantize8, TakesTheBinThatHoldsTheValue) {
  at::manual_seed(1);
  for (const auto map : kMaps) {
    const auto e = edges(map);
    const bool with_sign = map == DynamicMap::with_sign;
    ASSERT_EQ(e.size(), with_sign ? 128u : 255u);
    // Magnitudes down to below the smallest bin, and both sides of every edge: 1e-5 from it, about twice what float32
    // leaves of a bin at 0.1.
    const auto edge = at::tensor(e, at::kDouble);
    auto x = at::cat({at::pow(10.0, -8 * at::rand({4096})), (edge * (1 + 1e-5)).clamp_max(1.0).to(at::kFloat),
                      (edge * (1 - 1e-5)).to(at::kFloat)});
    if (with_sign) x = at::cat({x, -x});
    const auto blocks = at::cat({x, at::zeros({(255 - x.numel() % 255) % 255})}).view({-1, 255});
    const auto q = quantize8(at::cat({blocks, at::ones({blocks.size(0), 1})}, 1), map);  // each block's largest is 1
    const auto codes = q.codes.slice(1, 0, 255).reshape({-1});
    for (int64_t i = 0; i < x.numel(); ++i) {
      const double value = x[i].item<float>();
      int64_t want = std::upper_bound(e.begin(), e.end(), std::abs(value)) - e.begin();
      if (with_sign)
        want = value < 0 ? 127 - std::min<int64_t>(want, 127) : 127 + want;  // -1 is not in the map
      else
        want = std::max<int64_t>(want, 1);
      ASSERT_EQ(codes[i].item<int64_t>(), want) << value;
    }
  }
}

TEST(Quantize8, ErrorIsBoundedInEveryBlock) {
  at::manual_seed(2);
  for (const int64_t n : {0, 1, 7, 255, 256, 257, 1000, 100003}) {
    for (const auto map : kMaps) {
      auto x = at::randn({n}) * at::exp(2 * at::randn({n}));
      if (map == DynamicMap::without_sign) x = x.abs();
      const auto q = quantize8(x, map);
      ASSERT_EQ(q.scales.numel(), (n + 255) / 256);
      const auto y = dequantize8(q, map);
      for (int64_t b = 0; b * 256 < n; ++b) {
        const auto xb = x.slice(0, b * 256, std::min(n, b * 256 + 256)),
                   yb = y.slice(0, b * 256, std::min(n, b * 256 + 256));
        const double largest = xb.abs().max().item<double>();
        EXPECT_EQ(q.scales[b].item<double>(), largest);
        // Half a bin: 0.45 / n of the decade's top, n = 64 or 128 in the top decade and halved in each one below.
        const bool with_sign = map == DynamicMap::with_sign;
        const auto r = xb.abs() / largest;
        const auto decade = at::floor(at::log10(r.clamp_min(1e-30))).add(7).clamp(0, 6),
                   bins = at::pow(2.0, decade + (with_sign ? 0 : 1));
        auto bound = at::pow(10.0, decade - 6) * 0.45 / bins;
        if (with_sign)
          bound = at::where(xb < -0.99 * largest, at::full_like(bound, 0.9 / 64), bound);  // -1 is not in the map
        EXPECT_LE(((yb - xb).abs() / largest - bound).max().item<double>(), 2e-7) << "n " << n << ", block " << b;
      }
    }
  }
}

TEST(Quantize8, ZerosTinyAndBrokenValues) {
  const auto zeros = quantize8(at::zeros({300}), DynamicMap::with_sign);
  EXPECT_TRUE(at::equal(dequantize8(zeros, DynamicMap::with_sign), at::zeros({300})));
  auto x = at::zeros({256});
  x[3] = 1e-30f;
  x[4] = 1.0f;
  EXPECT_GT(dequantize8(quantize8(x, DynamicMap::without_sign), DynamicMap::without_sign)[3].item<float>(), 0.0f)
      << "a positive root never becomes 0";
  EXPECT_EQ(dequantize8(quantize8(x, DynamicMap::with_sign), DynamicMap::with_sign)[3].item<float>(), 0.0f);
  EXPECT_TRUE(at::equal(dequantize8(quantize8(at::full({5}, 1e-40f), DynamicMap::with_sign), DynamicMap::with_sign),
                        at::zeros({5})))
      << "below the normal range";
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    x = at::ones({512});
    x[5] = bad;
    const auto y = dequantize8(quantize8(x, DynamicMap::with_sign), DynamicMap::with_sign);
    EXPECT_FALSE(std::isfinite(y[5].item<float>())) << "a broken value stays visible";
    EXPECT_EQ(y[300].item<float>(), 1.0f) << "in its block alone";
  }
}

// The same step in float32 by ATen operations.
struct Plain {
  at::Tensor exp_avg, root;
  void step(const at::Tensor& p, const at::Tensor& grad, const Adamw8Options& o) {
    const auto g = grad * o.grad_factor;
    exp_avg = exp_avg * o.beta1 + g * (1 - o.beta1);
    root = (root * root * o.beta2 + g * g * (1 - o.beta2)).sqrt();
    const auto direction = exp_avg / (1 - std::pow(o.beta1, double(o.step))) /
                           (root / std::sqrt(1 - std::pow(o.beta2, double(o.step))) + o.epsilon);
    p.mul_(1 - o.lr * o.weight_decay).sub_(direction * o.lr);
  }
};

TEST(Adamw8, IsReadUpdateAndRoundAgain) {
  at::manual_seed(3);
  for (const int64_t n : {1, 255, 256, 257, 5000, 40001}) {
    const auto ours = at::randn({n}), theirs = ours.clone();
    const auto state = adamw8_zero_state(ours);
    for (int64_t t = 1; t <= 5; ++t) {
      const auto g = at::randn({n}) * at::exp(at::randn({n}) - 8);
      const Adamw8Options o{1e-2, 0.9, 0.95, 1e-8, 0.1, t, t == 3 ? 0.25 : 1.0};
      Plain plain{dequantize8(state.exp_avg, DynamicMap::with_sign), dequantize8(state.root, DynamicMap::without_sign)};
      theirs.copy_(ours);
      plain.step(theirs, g, o);
      adamw8_step(ours, g, state, o);
      // A handful of roundings in other places: 1e-2 times a few ulp of the direction (at most ~7), plus an ulp of the
      // parameter.
      EXPECT_LE((ours - theirs).abs().max().item<double>(), 1e-6) << "n " << n << ", step " << t;
      const auto m = quantize8(plain.exp_avg, DynamicMap::with_sign),
                 r = quantize8(plain.root, DynamicMap::without_sign);
      EXPECT_LE((m.scales - state.exp_avg.scales).abs().max().item<double>(), 1e-6 * m.scales.max().item<double>());
      // A value within a rounding of a boundary may fall on its other side.
      EXPECT_LE((m.codes.to(at::kInt) - state.exp_avg.codes.to(at::kInt)).abs().max().item<int64_t>(), 1);
      EXPECT_LE((m.codes != state.exp_avg.codes).sum().item<int64_t>(), 1 + n / 1000);
      EXPECT_LE((r.codes != state.root.codes).sum().item<int64_t>(), 1 + n / 1000);
    }
  }
}

TEST(Adamw8, BitsDoNotDependOnThreads) {
  at::manual_seed(4);
  const auto start = at::randn({100001});
  std::vector<at::Tensor> grads;
  for (int i = 0; i < 3; ++i) grads.push_back(at::randn({100001}));
  const auto run = [&](int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    const auto p = start.clone();
    const auto state = adamw8_zero_state(p);
    for (int64_t t = 1; t <= 3; ++t) adamw8_step(p, grads[t - 1], state, {1e-2, 0.9, 0.95, 1e-8, 0.0, t});
    at::set_num_threads(before);
    return at::cat({p, state.exp_avg.codes.to(at::kFloat), state.exp_avg.scales, state.root.codes.to(at::kFloat),
                    state.root.scales});
  };
  EXPECT_TRUE(at::equal(run(1), run(3)));
}

TEST(Adamw8, SmallGradientsBesideLargeOnesMakeNoLargeUpdates) {
  // Gradients over five decades in one block that then stop: a second moment rounded to 0 would divide the first by
  // epsilon.
  const auto p = at::zeros({256}), g = at::pow(10.0, -at::arange(256).to(at::kFloat) * (5.0 / 255));
  const auto state = adamw8_zero_state(p);
  for (int64_t t = 1; t <= 20; ++t) {
    const auto before = p.clone();
    auto now = g.clone();
    if (t > 10) now.slice(0, 1).zero_();  // the largest keeps the scale up
    adamw8_step(p, now, state, {1.0, 0.9, 0.95, 1e-12, 0.0, t});
    EXPECT_LE((p - before).abs().max().item<double>(), 2.0) << "step " << t;
  }
}

TEST(Adamw8, RefusesWhatItCannotWalk) {
  const auto p = at::zeros({4, 4});
  const auto state = adamw8_zero_state(p);
  const Adamw8Options o{1e-2, 0.9, 0.95, 1e-8, 0.0, 1};
  EXPECT_NO_THROW(adamw8_step(at::zeros({0}), at::zeros({0}), adamw8_zero_state(at::zeros({0})), o));
  EXPECT_THROW(adamw8_step(p, at::zeros({4, 4}).t().slice(0, 0, 2), state, o), InvariantError);
  EXPECT_THROW(adamw8_step(p.t().slice(0, 0, 2), at::zeros({2, 4}), state, o), InvariantError);
  EXPECT_THROW(adamw8_step(p, at::zeros({4, 4}, at::kDouble), state, o), InvariantError);
  EXPECT_THROW(adamw8_step(p, p, adamw8_zero_state(at::zeros({5})), o), InvariantError);
}

TEST(Adamw8, CudaHasTheBitsOfTheCpu) {
  if (!at::hasCUDA() || !torch::cuda::is_available()) {
    ASSERT_EQ(std::getenv("MOEGRAFT_REQUIRE_GPU"), nullptr) << "MOEGRAFT_REQUIRE_GPU is set, but there is no GPU";
    GTEST_SKIP() << "no GPU";
  }
  at::manual_seed(5);
  for (const int64_t n : {1, 257, 100003}) {
    const auto host = at::randn({n}), device = host.to(at::kCUDA);
    const auto on_host = adamw8_zero_state(host), on_device = adamw8_zero_state(device);
    for (int64_t t = 1; t <= 10; ++t) {
      const auto g = at::randn({n}) * at::exp(2 * at::randn({n}));
      adamw8_step(host, g, on_host, {1e-2, 0.9, 0.95, 1e-8, 0.1, t, 0.5});
      adamw8_step(device, g.to(at::kCUDA), on_device, {1e-2, 0.9, 0.95, 1e-8, 0.1, t, 0.5});
    }
    EXPECT_TRUE(at::equal(host, device.cpu())) << n;
    EXPECT_TRUE(at::equal(on_host.exp_avg.codes, on_device.exp_avg.codes.cpu()) &&
                at::equal(on_host.exp_avg.scales, on_device.exp_avg.scales.cpu()))
        << n;
    EXPECT_TRUE(at::equal(on_host.root.codes, on_device.root.codes.cpu()) &&
                at::equal(on_host.root.scales, on_device.root.scales.cpu()))
        << n;
  }
}

}  // namespace
}  // namespace moegraft::kernels
