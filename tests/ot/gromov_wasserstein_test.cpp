#include "moegraft/ot/gromov_wasserstein.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "golden.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/ot/sinkhorn.h"

namespace moegraft::ot {
namespace {

at::Tensor cloud(int64_t n, int64_t d, uint64_t seed) {
  Rng rng(seed, "test.cloud");
  at::Tensor x = at::empty({n, d}, at::kDouble);
  for (int64_t i = 0; i < n * d; ++i) x.mutable_data_ptr<double>()[i] = rng.normal();
  return x;
}

at::Tensor index(const std::vector<int64_t>& v) { return at::tensor(v, at::kLong); }

// POT's iterates: exact inner solves.
Settings exact(std::vector<double> epsilon, Solver solver, int64_t iterations) {
  Settings s;
  s.solver = solver;
  s.epsilon = std::move(epsilon);
  s.max_iterations = iterations;
  s.sinkhorn_iterations = 200000;
  s.sinkhorn_tolerance = 1e-13;
  return s;
}

double marginal_error(const at::Tensor& plan, const at::Tensor& p, const at::Tensor& q) {
  return std::max((plan.sum(1) - p).abs().max().item<double>(), (plan.sum(0) - q).abs().max().item<double>());
}

TEST(GromovWasserstein, PublishedPotValuesAfterTenIterations) {
  const at::Tensor x = golden("x10"), y = x.flip(0);
  const Cost cx = Cost::squared_euclidean(x), cy = Cost::squared_euclidean(y);
  ASSERT_TRUE(cx.factored());
  // POT leaves its inner loop after 1000 iterations, short of convergence: the same path, the first iteration being the
  // kernel's build.
  Settings s = exact({0.01}, Solver::entropic, 10);
  s.plain = true;
  s.sinkhorn_iterations = 999;
  const Result pgd = solve(cx, cy, s);
  EXPECT_NEAR(pgd.objective, 0.00233438993966, 1e-12);
  EXPECT_NEAR(pgd.plan_NM[0][9].item<double>(), 0.0923363053631, 1e-11);
  EXPECT_LT((pgd.plan_NM - golden("PGD10.plan")).abs().max().item<double>(), 1e-11);
  s.epsilon = {0.1};
  s.solver = Solver::proximal;
  const Result ppa = solve(cx, cy, s);
  EXPECT_NEAR(ppa.objective, 0.00777948737188, 1e-9);  // POT's inner loop stops at 1e-9 here, ours goes on
  EXPECT_NEAR(ppa.plan_NM[0][9].item<double>(), 0.071635887737, 1e-9);
  EXPECT_LT((ppa.plan_NM - golden("PPA10.plan")).abs().max().item<double>(), 1e-9);
  EXPECT_EQ(ppa.iterations, 10);
  EXPECT_FALSE(ppa.converged);
  // Warm starts and over-relaxation reach the same iterates as far as POT's marginals allow.
  s = exact({0.01}, Solver::entropic, 10);
  s.sinkhorn_iterations = 20000;
  EXPECT_NEAR(solve(cx, cy, s).objective, 0.00233438993966, 1e-6);
}

TEST(GromovWasserstein, PublishedPotValuesAtConvergence) {
  const Cost a = Cost::squared_euclidean(golden("a20")), b = Cost::squared_euclidean(golden("b20"));
  // At .01 and .005 the published figures are where 20000 inner iterations of POT stopped, with marginals off by 1e-7
  // and 2e-6 (max |sum - 1/20|; 100000 give 3.148617593e-2 and 2.9137773616e-2, rising): the slip is that error.
  const struct {
    double epsilon, published, slip;
  } cases[] = {
      {0.1, 0.0807281079, 1e-9}, {0.05, 0.0566920641, 1e-9}, {0.01, 0.0314861253, 1e-7}, {0.005, 0.0291372887, 1e-6}};
  for (const auto& c : cases) {
    Settings s = exact({c.epsilon}, Solver::entropic, 1000);
    s.sinkhorn_tolerance = 1e-12;
    s.sinkhorn_iterations = 20000;
    const Result r = solve(a, b, s);
    EXPECT_NEAR(r.objective, c.published, c.slip) << c.epsilon;
    EXPECT_LT(r.marginal_error, 1e-9) << c.epsilon;
    EXPECT_TRUE(r.converged || c.epsilon < 0.007) << c.epsilon << ": " << r.reason;
  }
}

TEST(GromovWasserstein, WeightsOddShapesKlLossAndAsymmetricCosts) {
  at::Tensor p = at::arange(1, 21, at::kDouble), q = at::tensor({3.0, 1.0, 1.0, 2.0, 1.0, 4.0, 2.0}, at::kDouble);
  p = p / p.sum();
  q = q / q.sum();
  const Cost a = Cost::squared_euclidean(golden("a20")), c = Cost::squared_euclidean(golden("c7"));
  Settings s = exact({0.05}, Solver::entropic, 15);
  const Result square = solve(a, c, s, p, q);
  EXPECT_NEAR(square.objective, golden_value("weighted.square_loss.value"), 1e-12);
  EXPECT_LT((square.plan_NM - golden("weighted.square_loss.plan")).abs().max().item<double>(), 1e-11);
  EXPECT_LT(marginal_error(square.plan_NM, p, q), 1e-9);
  s.loss = Loss::kl;
  const Result kl = solve(a, c, s, p, q);
  EXPECT_NEAR(kl.objective, golden_value("weighted.kl_loss.value"), 1e-11);
  EXPECT_LT((kl.plan_NM - golden("weighted.kl_loss.plan")).abs().max().item<double>(), 1e-11);
  s.loss = Loss::square;
  s.scaling = Scaling::none;
  Cost scaled = a;
  scaled.scale(1.0 / a.max());
  const Result skew = solve(scaled, Cost::dense(golden("skew7")), s, p, q);
  EXPECT_NEAR(skew.objective, golden_value("asymmetric.value"), 1e-12);
  EXPECT_LT((skew.plan_NM - golden("asymmetric.plan")).abs().max().item<double>(), 1e-11);
}

TEST(GromovWasserstein, RecoversAPermutedIsometricCopy) {
  const int64_t n = 60, d = 5;
  const at::Tensor x = cloud(n, d, 1);
  const auto order = Rng(2, "test.order").permutation(n);
  const at::Tensor rotation = std::get<0>(at::linalg_qr(cloud(d, d, 3)));
  const at::Tensor y = at::mm(x.index_select(0, index(order)), rotation) * 7.0 + 3.0;  // scaling is divided out
  for (Solver solver : {Solver::entropic, Solver::proximal}) {
    Settings s;
    s.solver = solver;
    s.epsilon =
        solver == Solver::entropic ? std::vector<double>{0.05, 0.01, 0.002, 0.0005} : std::vector<double>{0.05, 0.01};
    s.max_iterations = 300;
    const Result r = solve(Cost::squared_euclidean(x), Cost::squared_euclidean(y), s);
    // The entropic optimum keeps a little mass on near neighbours at any epsilon; the proximal one only what 1e-9 of
    // marginal error allows.
    EXPECT_NEAR(r.objective, 0.0, solver == Solver::entropic ? 1e-5 : 1e-10);
    EXPECT_NEAR(r.row_perplexity, 1.0, solver == Solver::entropic ? 0.02 : 1e-6);
    const at::Tensor match = r.plan_NM.argmax(0);
    EXPECT_TRUE(at::equal(match, index(order))) << int(solver);
    EXPECT_LT(r.marginal_error, 1e-9);
    EXPECT_TRUE(r.converged || solver == Solver::entropic) << r.reason;
  }
}

TEST(GromovWasserstein, FactoredEqualsDense) {
  const at::Tensor x = cloud(40, 3, 4), y = cloud(31, 6, 5);
  const Cost fx = Cost::squared_euclidean(x), fy = Cost::squared_euclidean(y);
  const Cost dx = Cost::dense(at::cdist(x, x).square()), dy = Cost::dense(at::cdist(y, y).square());
  ASSERT_TRUE(fx.factored() && fy.factored() && !dx.factored());
  EXPECT_NEAR(fx.max(), dx.max(), 1e-12);
  EXPECT_NEAR(fx.mean(), dx.mean(), 1e-12);
  const at::Tensor w = at::softmax(cloud(1, 40, 6)[0], 0), t = cloud(40, 31, 7).abs();
  EXPECT_TRUE(at::allclose(fx.squares_times(w), dx.squares_times(w), 1e-12, 1e-12));
  EXPECT_TRUE(at::allclose(fx.times(t), dx.times(t), 1e-12, 1e-12));
  const Settings s = exact({0.02}, Solver::entropic, 5);
  const Result reference = solve(dx, dy, s);
  for (const auto& [a, b] : {std::pair{fx, fy}, {fx, dy}, {dx, fy}}) {
    const Result r = solve(a, b, s);
    EXPECT_LT((r.plan_NM - reference.plan_NM).abs().max().item<double>(), 1e-12);
    EXPECT_NEAR(r.objective, reference.objective, 1e-13);
  }
}

TEST(GromovWasserstein, ObjectiveOfAPlanByItsDefinition) {
  const at::Tensor x = cloud(5, 2, 8), y = cloud(4, 3, 9);
  const at::Tensor plan = at::outer(at::softmax(cloud(1, 5, 10)[0], 0), at::softmax(cloud(1, 4, 11)[0], 0));
  const at::Tensor cx = at::cdist(x, x).square(), cy = at::cdist(y, y).square();
  double expected = 0;
  for (int i = 0; i < 5; ++i)
    for (int k = 0; k < 5; ++k)
      for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 4; ++l)
          expected += std::pow(cx[i][k].item<double>() - cy[j][l].item<double>(), 2) * plan[i][j].item<double>() *
                      plan[k][l].item<double>();
  EXPECT_NEAR(objective(Cost::squared_euclidean(x), Cost::squared_euclidean(y), plan), expected, 1e-10);
}

TEST(GromovWasserstein, AnnealingSharpensAndReports) {
  const Cost x = Cost::squared_euclidean(cloud(30, 4, 12)), y = Cost::squared_euclidean(cloud(50, 4, 13));
  Settings s;
  s.epsilon = {0.1, 0.01};
  s.max_iterations = 40;
  s.slack = 0.1;
  const Result plain = solve(x, y, s);
  ASSERT_EQ(plain.stages.size(), 2u);
  EXPECT_LT(plain.stages[1].row_perplexity, plain.stages[0].row_perplexity);
  EXPECT_LT(plain.stages[1].objective, plain.stages[0].objective);
  s.sharpen = 8;
  s.sharp_perplexity = 1.5;
  const Result sharp = solve(x, y, s);
  EXPECT_GT(sharp.stages.size(), 2u);
  EXPECT_LE(sharp.row_perplexity, 1.5 * 50 / 30 + 0.05);
  EXPECT_LT(sharp.marginal_error, 1e-9);
  EXPECT_FALSE(sharp.reason.empty());
}

TEST(GromovWasserstein, StopsEarlyWithGoodMarginals) {
  Settings s;
  s.epsilon = {0.001};
  s.max_iterations = 3;
  s.sinkhorn_iterations = 2;
  const Result r = solve(Cost::squared_euclidean(cloud(30, 2, 14)), Cost::squared_euclidean(cloud(25, 2, 15)), s);
  EXPECT_FALSE(r.converged);
  EXPECT_TRUE(r.rounded);
  EXPECT_GT(r.stages[0].marginal_error, 1e-3);
  EXPECT_LT(r.marginal_error, 1e-12);
  EXPECT_GE(r.objective, 0);
}

TEST(GromovWasserstein, SmallestAndFlatClouds) {
  const Settings s;
  const Result one = solve(Cost::squared_euclidean(cloud(1, 3, 1)), Cost::squared_euclidean(cloud(1, 2, 1)), s);
  EXPECT_EQ(one.plan_NM.item<double>(), 1.0);
  EXPECT_EQ(one.objective, 0.0);
  const Result row = solve(Cost::squared_euclidean(cloud(1, 3, 1)), Cost::squared_euclidean(cloud(6, 2, 1)), s);
  EXPECT_TRUE(at::allclose(row.plan_NM, at::full({1, 6}, 1.0 / 6, at::kDouble)));
  const Result flat =
      solve(Cost::squared_euclidean(at::full({8, 2}, 0.1, at::kDouble)), Cost::squared_euclidean(cloud(9, 2, 1)), s);
  EXPECT_EQ(Cost::squared_euclidean(at::full({8, 2}, 0.1, at::kDouble)).max(), 0.0);
  EXPECT_TRUE(at::allclose(flat.plan_NM, at::full({8, 9}, 1.0 / 72, at::kDouble)));
  EXPECT_EQ(flat.scale_x, 1.0);
  EXPECT_TRUE(flat.converged);
  EXPECT_NEAR(flat.row_perplexity, 9.0, 1e-9);
}

TEST(GromovWasserstein, StartsFromAGivenPlan) {
  // An x-shaped cloud has mirror optima; the start decides which one is found.
  const at::Tensor x = at::tensor({0.0, 1.0, 3.0, 4.0}, at::kDouble);
  const Cost c = Cost::squared_euclidean(x);
  Settings s;
  s.epsilon = {0.01};
  const at::Tensor mirror = at::eye(4, at::kDouble).flip(0) / 4.0;
  for (Solver solver : {Solver::entropic, Solver::proximal}) {
    s.solver = solver;
    EXPECT_TRUE(at::allclose(solve(c, c, s, {}, {}, mirror).plan_NM, mirror, 0, 1e-6));
    EXPECT_TRUE(at::allclose(solve(c, c, s, {}, {}, at::eye(4, at::kDouble) / 4.0).plan_NM,
                             at::eye(4, at::kDouble) / 4.0, 0, 1e-6));
  }
}

TEST(GromovWasserstein, RejectsBadInput) {
  const at::Tensor x = cloud(5, 2, 1);
  const Cost c = Cost::squared_euclidean(x);
  at::Tensor nan = x.clone();
  nan[2][1] = std::nan("");
  EXPECT_THROW(Cost::squared_euclidean(nan), UserError);
  EXPECT_THROW(Cost::squared_euclidean(at::empty({0, 2}, at::kDouble)), UserError);
  EXPECT_THROW(Cost::squared_euclidean(at::zeros({2, 2}, at::kLong)), UserError);
  EXPECT_THROW(Cost::squared_euclidean(at::zeros({2, 2, 2}, at::kDouble)), UserError);
  EXPECT_THROW(Cost::dense(cloud(3, 4, 1)), UserError);
  EXPECT_THROW(Cost::dense(at::full({2, 2}, INFINITY, at::kDouble)), UserError);
  EXPECT_THROW(solve(c, c, {}, at::full({5}, 0.3, at::kDouble)), UserError);
  EXPECT_THROW(solve(c, c, {}, at::full({4}, 0.25, at::kDouble)), UserError);
  EXPECT_THROW(solve(c, c, {}, at::tensor({1.2, -0.2, 0.0, 0.0, 0.0}, at::kDouble)), UserError);
  EXPECT_THROW(solve(c, c, {}, {}, {}, at::ones({5, 4}, at::kDouble)), UserError);
  Settings s;
  s.epsilon = {0.1, 0.0};
  EXPECT_THROW(solve(c, c, s), UsageError);
  s.epsilon = {};
  EXPECT_THROW(solve(c, c, s), UsageError);
  EXPECT_THROW(barycentric(at::ones({2, 3}), at::ones({2, 2})), UserError);
}

TEST(Sinkhorn, ClosedFormAndExtremes) {
  // With logits a_i + b_j the plan is p q^T, whatever their size.
  const at::Tensor p = at::tensor({0.25, 0.75}, at::kDouble), q = at::tensor({0.5, 0.125, 0.375}, at::kDouble);
  const at::Tensor logits =
      at::tensor({5000.0, -3000.0}, at::kDouble).unsqueeze(1) + at::tensor({-9000.0, 0.0, 7000.0}, at::kDouble);
  SinkhornState state;
  const SinkhornResult r = sinkhorn(logits, p, q, state, 50, 1e-12);
  EXPECT_TRUE(r.converged);
  EXPECT_TRUE(at::allclose(r.plan_NM, at::outer(p, q), 1e-10, 1e-12));
  // Kernel entries of e^-2000 between halves that must exchange mass.
  const at::Tensor split = at::tensor({0.0, -2000.0, -2000.0, 0.0}, at::kDouble).view({2, 2});
  SinkhornState cold;
  const SinkhornResult far = sinkhorn(split, p, at::tensor({0.5, 0.5}, at::kDouble), cold, 20000, 1e-9);
  EXPECT_TRUE(far.plan_NM.isfinite().all().item<bool>());
  EXPECT_LT(far.error, 0.5 + 1e-9);
  at::Tensor rounded = far.plan_NM;
  round_to_marginals(rounded, p, at::tensor({0.5, 0.5}, at::kDouble));
  EXPECT_NEAR(rounded[1][0].item<double>(), 0.25, 1e-9);
}

}  // namespace
}  // namespace moegraft::ot
