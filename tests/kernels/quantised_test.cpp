// Quantised weights: their numbers are the format's definition, and every product has the bits of the same product with
// these numbers as floats. Run once for each CPU path (tests/CMakeLists.txt).
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "libtorch.h"

#include <torch/csrc/autograd/autograd.h>

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  return at::empty(shape, at::kFloat).normal_(0.0, 1.0, at::make_generator<at::CPUGeneratorImpl>(seed)).to(dtype);
}

// ggml's quantize_row_q8_0_ref and dequantize_row_q8_0, a row's last block completed with zeros.
at::Tensor q8_0_values(const at::Tensor& w) {
  const at::Tensor in = w.to(at::kFloat).contiguous(), out = at::empty_like(in);
  const int64_t K = in.size(1);
  for (int64_t r = 0; r < in.size(0); ++r)
    for (int64_t k = 0; k < K; k += 32) {
      const float* x = in.const_data_ptr<float>() + r * K + k;
      const int64_t n = std::min<int64_t>(32, K - k);
      float largest = 0;
      for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
      const float d = largest / 127, id = d != 0 ? 1 / d : 0, stored = float(at::Half(d));
      for (int64_t i = 0; i < n; ++i) out.mutable_data_ptr<float>()[r * K + k + i] = std::round(x[i] * id) * stored;
    }
  return out;
}

TEST(Q8_0, TakesTheValuesOfItsDefinition) {
  for (const int64_t N : {1, 16, 17, 64, 65, 200})
    for (const int64_t K : {1, 31, 32, 33, 100, 576})
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
        at::Tensor w = randn({N, K}, uint64_t(N * K), dtype);
        w[0].zero_();
        if (N > 1) w[1].mul_(1e-3), w[N - 1].mul_(100);
        const Matrix q = quantise(w, WeightFormat::q8_0);
        EXPECT_EQ(q.rows(), N);
        EXPECT_EQ(q.columns(), K);
        ASSERT_TRUE(at::equal(q.dense(at::kFloat), q8_0_values(w))) << N << " x " << K << " " << dtype;
        const at::Tensor ids = at::tensor({N - 1, int64_t{0}, N / 2, N - 1}).view({2, 2});
        for (const auto to : {at::kFloat, at::kBFloat16})
          ASSERT_TRUE(at::equal(embedding(q, ids, to), q8_0_values(w).index({ids}).to(to))) << N << " x " << K;
        EXPECT_EQ(q.bytes(), q.quantised() ? (N + 15) / 16 * 16 * ((K + 31) / 32) * 34 : 4 * N * K);
      }
  // Halves away from zero; a matrix that is a view of another.
  at::Tensor halves = at::zeros({1, 32});
  halves[0][0] = 127, halves[0][1] = 2.5, halves[0][2] = -2.5, halves[0][3] = 0.5;
  const at::Tensor got = quantise(halves, WeightFormat::q8_0).dense(at::kFloat);
  EXPECT_EQ(got[0][1].item<float>(), 3);
  EXPECT_EQ(got[0][2].item<float>(), -3);
  EXPECT_EQ(got[0][3].item<float>(), 1);
  const at::Tensor both = randn({40, 70}, 3);
  EXPECT_TRUE(at::equal(quantise(both.narrow(0, 20, 20), WeightFormat::q8_0).dense(at::kFloat),
                        q8_0_values(both.narrow(0, 20, 20))));
  EXPECT_TRUE(at::equal(quantise(both.t(), WeightFormat::q8_0).dense(at::kFloat), q8_0_values(both.t().contiguous())));
  EXPECT_TRUE(at::equal(quantise(at::full({3, 40}, 1e-39f), WeightFormat::q8_0).dense(at::kFloat), at::zeros({3, 40})))
      << "below what its scale can say";
}

TEST(Q8_0, NamesWeightsThatItCannotHold) {
  for (const float bad : {INFINITY, NAN, 1e7f * 127}) {
    at::Tensor w = randn({70, 40}, 1);
    w[66][35] = bad;
    try {
      quantise(w, WeightFormat::q8_0);
      FAIL() << bad;
    } catch (const UserError& e) {
      EXPECT_NE(std::string(e.what()).find("row 66, columns 32 to 39"), std::string::npos) << e.what();
    }
  }
}

// The same numbers as floats of the compute dtype.
Matrix as_floats(const at::Tensor& w, at::ScalarType dtype) {
  return pack_weight(quantise(w, WeightFormat::q8_0).dense(dtype));
}

TEST(Q8_0, LinearLayersHaveTheBitsOfItsValues) {
  if (!quantised_products()) GTEST_SKIP() << "this path keeps the values as floats";
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t X : {1, 5, 33, 300})
      for (const int64_t K : {7, 64, 130, 321}) {
        std::vector<FrozenLinearWeight> stored, floats;
        for (const int64_t N : {int64_t{5}, int64_t{64}, int64_t{201}}) {
          const at::Tensor w = randn({N, K}, uint64_t(N + K));
          stored.push_back({quantise(w, WeightFormat::q8_0), {}});
          floats.push_back({as_floats(w, dtype), {}});
        }
        const auto run = [&](const std::vector<FrozenLinearWeight>& weights) {
          const at::Tensor x = randn({X, K}, 5, dtype).set_requires_grad(true);
          std::vector<at::Tensor> y = frozen_linear(x, weights), dy;
          for (size_t i = 0; i < y.size(); ++i) dy.push_back(randn(y[i].sizes(), 6 + i, dtype));
          y.push_back(torch::autograd::grad(y, {x}, dy)[0]);
          return y;
        };
        const auto got = run(stored), want = run(floats);
        for (size_t i = 0; i < got.size(); ++i)
          ASSERT_TRUE(at::equal(got[i], want[i])) << dtype << " " << X << " x " << K << ", " << i;
      }
}

TEST(Q8_0, TheLossHasTheBitsOfItsValues) {
  if (!quantised_products()) GTEST_SKIP() << "this path keeps the values as floats";
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& [X, D, V] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 4, 5}, {37, 33, 1000}, {300, 64, 513}, {65, 16, 20011}}) {
      const at::Tensor w = randn({V, D}, 2), target = (at::arange(X) * 7) % V;
      const auto run = [&](const Matrix& head) {
        const at::Tensor h = randn({X, D}, 1, dtype).set_requires_grad(true),
                         loss = linear_cross_entropy(h, head, target, 1.0 / double(X));
        return std::pair(loss, torch::autograd::grad({loss}, {h})[0]);
      };
      const auto [got, dgot] = run(quantise(w, WeightFormat::q8_0));
      const auto [want, dwant] = run(as_floats(w, dtype));
      EXPECT_TRUE(at::equal(got, want)) << dtype << " " << X << " " << D << " " << V;
      EXPECT_TRUE(at::equal(dgot, dwant)) << dtype << " " << X << " " << D << " " << V;
    }
}

TEST(Q8_0, ExpertsHaveTheBitsOfTheirValues) {
  if (!quantised_products()) GTEST_SKIP() << "this path keeps the values as floats";
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const auto& [X, D, F] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {1, 33, 17}, {40, 96, 40}, {700, 70, 130}}) {  // one row, few (across), several chunks
      const int64_t E = 3, K = 2;
      ExpertFfnWeights weights, floats;
      for (int64_t e = 0; e < E; ++e) {
        weights.gate_FD.push_back(randn({F, D}, uint64_t(10 * e + 1))),
            weights.up_FD.push_back(randn({F, D}, uint64_t(10 * e + 2))),
            weights.down_DF.push_back(randn({D, F}, uint64_t(10 * e + 3)));
        floats.gate_FD.push_back(as_floats(weights.gate_FD[size_t(e)], dtype).tensor()),
            floats.up_FD.push_back(as_floats(weights.up_FD[size_t(e)], dtype).tensor());
        floats.down_DF.push_back(as_floats(weights.down_DF[size_t(e)], dtype).tensor());
      }
      floats.panels = make_expert_panels(floats, nullptr, /*lean=*/true);
      quantise_experts(weights, WeightFormat::q8_0);
      EXPECT_TRUE(weights.gate_FD.empty());
      EXPECT_EQ(weights.num_experts(), E);
      const at::Tensor group = at::arange(X) % 2, ids = at::stack({at::arange(X) % E, (at::arange(X) + 1) % E}, 1);
      const Dispatch dispatch = make_dispatch(ids, E, group, 2);
      const auto run = [&](const ExpertFfnWeights& w) {
        const at::Tensor x = randn({X, D}, 20, dtype).set_requires_grad(true),
                         mix = randn({X, K}, 21).abs().set_requires_grad(true);
        std::vector<at::Tensor> leaves{x, mix};
        ExpertFfnAdapters adapters;
        uint64_t seed = 30;
        for (const auto& [list, in, out] :
             {std::tuple(&adapters.gate, D, F), std::tuple(&adapters.up, D, F), std::tuple(&adapters.down, F, D)}) {
          const at::Tensor A = randn({E, 4, in}, seed++).set_requires_grad(true),
                           B = randn({E, out, 4}, seed++).set_requires_grad(true);
          list->push_back({A, B, 0.5, {false, true}});
          leaves.push_back(A), leaves.push_back(B);
        }
        at::Tensor hidden;
        std::vector<at::Tensor> result{moe_ffn(x, mix, dispatch, w, adapters, &hidden)};
        const auto grads = torch::autograd::grad({result[0]}, leaves, {randn({X, D}, 22, dtype)});
        result.push_back(hidden);
        result.insert(result.end(), grads.begin(), grads.end());
        return result;
      };
      const auto got = run(weights), want = run(floats);
      const bool same_layout =
          dtype == at::kFloat ||
          one_layout_serves(dtype);  // else the floats' second layout was read: other blocks, other sums
      for (size_t i = 0; i < got.size(); ++i) {
        if (same_layout) {
          ASSERT_TRUE(at::equal(got[i], want[i])) << dtype << " " << X << ", result " << i;
          continue;
        }
        ASSERT_LT((got[i].to(at::kDouble) - want[i].to(at::kDouble)).abs().max().item<double>(),
                  2e-2 * (1 + want[i].abs().max().item<double>()))
            << X << ", result " << i;
      }
    }
}

}  // namespace
}  // namespace moegraft::kernels
