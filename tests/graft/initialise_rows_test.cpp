#include "moegraft/graft/initialise_rows.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::graft {
namespace {

at::Tensor cloud(int64_t n, int64_t d, uint64_t seed) {
  Rng rng(seed, "test.rows");
  at::Tensor x = at::empty({n, d}, at::kFloat);
  for (int64_t i = 0; i < n * d; ++i) x.mutable_data_ptr<float>()[i] = float(rng.normal());
  return x;
}

// Anisotropic, off-centre text rows, as embeddings are.
at::Tensor text_rows(int64_t v, int64_t d, uint64_t seed) {
  return at::mm(cloud(v, d, seed), cloud(d, d, seed + 100)) * 0.3 + cloud(1, d, seed + 200);
}

ot::OtConfig quick() {
  ot::OtConfig ot;
  ot.epsilon = {0.05, 0.01, 0.003};
  ot.clusters = 16;
  ot.max_iterations = 30;
  return ot;
}

TEST(InitialiseRows, ShapesScaleAndDeterminism) {
  const at::Tensor e = text_rows(300, 12, 1), h = text_rows(300, 12, 2), z = cloud(80, 5, 3);
  for (const auto& [value, method, meaning, needs_ot] : kRowInits) {
    const RowsInit a = initialise_rows(value, e, h, z, 2, quick(), 7),
                   b = initialise_rows(value, e, h, z, 2, quick(), 7),
                   c = initialise_rows(value, e, h, z, 2, quick(), 8);
    for (const auto& [rows, text] : {std::pair{a.embedding_ND, e}, {a.head_ND, h}}) {
      EXPECT_EQ(rows.sizes(), (std::vector<int64_t>{82, 12})) << method;
      EXPECT_EQ(rows.scalar_type(), at::kFloat) << method;
      EXPECT_TRUE(rows.isfinite().all().item<bool>()) << method;
      const double ratio = rows.norm(2, {1}).mean().item<double>() / text.norm(2, {1}).mean().item<double>();
      EXPECT_NEAR(ratio, 1.0, 0.2) << method;
    }
    EXPECT_TRUE(at::equal(a.embedding_ND, b.embedding_ND)) << method;
    EXPECT_TRUE(at::equal(a.head_ND, b.head_ND)) << method;
    EXPECT_FALSE(at::equal(a.embedding_ND, c.embedding_ND)) << method;  // the special rows at least
    EXPECT_FALSE(at::equal(a.embedding_ND, a.head_ND)) << method;
    const auto json = nlohmann::json::parse(a.report.to_json());
    EXPECT_EQ(json["method"], method);
    EXPECT_EQ(json.contains("gw"), needs_ot);
    if (json.contains("gw")) {
      EXPECT_GE(json["gw"]["stages"].size(), 3u) << method;
      EXPECT_NEAR(a.report.embedding.rms_deviation, a.report.text.rms_deviation, 1e-9) << method;
      EXPECT_GT(a.report.embedding.effective_rank, 3.0) << method;
    }
    const RowsInit tied = initialise_rows(value, e, e, z, 2, quick(), 7);
    EXPECT_TRUE(tied.head_ND.is_same(tied.embedding_ND)) << method;
  }
}

TEST(InitialiseRows, MomentMatchHasTheTextMoments) {
  const at::Tensor e = text_rows(200, 6, 4), h = e * 0.5 + text_rows(200, 6, 5);
  const RowsInit init = initialise_rows(RowInit::moment_match, e, h, cloud(20000, 2, 6), 2, quick(), 1);
  const auto covariance = [](const at::Tensor& x, const at::Tensor& y) {
    return at::mm((x - x.mean(0)).t(), y - y.mean(0)) / double(x.size(0));
  };
  const at::Tensor rows = init.embedding_ND.slice(0, 2), head = init.head_ND.slice(0, 2);
  const double sd = e.var().sqrt().item<double>();
  EXPECT_LT((rows.mean(0) - e.mean(0)).abs().max().item<double>(), 5 * sd * 1.5 / std::sqrt(20000.0));
  const at::Tensor target = covariance(e, e), cross = covariance(e, h);
  EXPECT_LT(((covariance(rows, rows) - target).norm() / target.norm()).item<double>(), 0.03);
  EXPECT_LT(((covariance(rows, head) - cross).norm() / cross.norm()).item<double>(),
            0.05);  // embedding and head stay related
}

TEST(InitialiseRows, SampledRowsAreDistinctTextRows) {
  const at::Tensor e = text_rows(90, 4, 7), h = text_rows(90, 4, 8);
  for (const RowInit method : {RowInit::sampled_rows, RowInit::gw_cluster}) {
    const RowsInit init = initialise_rows(method, e, h, cloud(40, 3, 9), 2, quick(), 1);
    if (method == RowInit::gw_cluster) continue;  // rescaled: checked below by rank
    std::set<int64_t> seen;
    for (int64_t i = 2; i < 42; ++i) {
      const int64_t id = (e - init.embedding_ND[i]).square().sum(1).argmin().item<int64_t>();
      EXPECT_TRUE(at::allclose(e[id], init.embedding_ND[i]));
      EXPECT_TRUE(at::allclose(h[id], init.head_ND[i]));  // the same token on both sides
      seen.insert(id);
    }
    EXPECT_EQ(seen.size(), 40u);
  }
}

TEST(InitialiseRows, ProcrustesKeepsTheCodebooksGeometry) {
  const at::Tensor e = text_rows(120, 10, 10), z = cloud(50, 4, 11);
  const RowsInit init = initialise_rows(RowInit::gw_procrustes, e, {}, z, 2, quick(), 1);
  const at::Tensor got = at::cdist(init.embedding_ND.slice(0, 2).to(at::kDouble),
                                   init.embedding_ND.slice(0, 2).to(at::kDouble), 2.0, 2),
                   want = at::cdist(z.to(at::kDouble), z.to(at::kDouble), 2.0, 2);
  const at::Tensor scale = (got * want).sum() / want.square().sum();
  EXPECT_LT(((got - want * scale).norm() / got.norm()).item<double>(), 1e-6);
  EXPECT_LE(init.report.embedding.effective_rank, 4.0 + 1e-6);
  ASSERT_FALSE(init.report.warnings.empty());
  EXPECT_NE(init.report.warnings[0].find("rank at most 4"), std::string::npos);
}

TEST(InitialiseRows, BarycentricRecoversAnIsometricCopy) {
  // The codebook is the text cloud, turned and shuffled: each code must land on its own text row.
  const at::Tensor e = text_rows(40, 6, 12);
  const at::Tensor turn = std::get<0>(at::linalg_qr(cloud(6, 6, 13)));
  const auto order = Rng(14, "test.order").permutation(40);
  const at::Tensor ids = at::tensor(order, at::kLong), z = at::mm(e.index_select(0, ids), turn) * 3.0;
  ot::OtConfig ot = quick();
  ot.epsilon = {0.05, 0.01, 0.002, 0.0005, 0.0001};
  ot.max_iterations = 200;
  for (const auto& [solver, name, meaning] : ot::kSolvers) {
    ot.solver = solver;
    const RowsInit init = initialise_rows(RowInit::gw_barycentric, e, {}, z, 2, ot, 1);
    const at::Tensor error = (init.embedding_ND.slice(0, 2) - e.index_select(0, ids)).norm(2, {1});
    EXPECT_LT(error.max().item<double>(), 0.02 * init.report.text.mean_norm) << name;
    EXPECT_NEAR(init.report.row_perplexity, 1.0, 0.02) << name;
    EXPECT_TRUE(init.report.warnings.empty()) << name << ": " << init.report.warnings[0];
  }
}

TEST(InitialiseRows, ReportsCollapseUnderALargeEpsilon) {
  ot::OtConfig ot = quick();
  ot.epsilon = {50.0};
  ot.max_iterations = 2;
  const RowsInit init = initialise_rows(RowInit::gw_barycentric, text_rows(100, 6, 15), {}, cloud(50, 3, 16), 2, ot, 1);
  EXPECT_GT(init.report.stages.size(), 1u);  // it tried to sharpen
  ASSERT_FALSE(init.report.warnings.empty());
  EXPECT_NE(init.report.warnings[0].find("collapsed"), std::string::npos);
  EXPECT_LT(init.report.raw.rms_deviation, 0.3 * init.report.text.rms_deviation);
}

TEST(InitialiseRows, LargeCloudsAreClusteredFirst) {
  ot::OtConfig ot = quick();
  ot.max_points = 30;
  for (const RowInit method : {RowInit::gw_barycentric, RowInit::gw_procrustes}) {
    const RowsInit init =
        initialise_rows(method, text_rows(200, 6, 17), text_rows(200, 6, 18), cloud(90, 4, 19), 2, ot, 1);
    EXPECT_EQ(init.report.points_x, 30);
    EXPECT_EQ(init.report.points_y, 30);
    // Codes of one cluster still differ.
    EXPECT_GT(at::cdist(init.embedding_ND.slice(0, 2), init.embedding_ND.slice(0, 2))
                  .fill_diagonal_(1e9)
                  .min()
                  .item<double>(),
              1e-4)
        << config::name_of(method);
  }
}

TEST(InitialiseRows, RejectsBadInput) {
  const at::Tensor e = text_rows(20, 4, 20), z = cloud(10, 2, 21);
  EXPECT_THROW(initialise_rows(RowInit::random, e[0], {}, z, 2, quick(), 1), UserError);
  EXPECT_THROW(initialise_rows(RowInit::random, e, e.slice(1, 0, 3), z, 2, quick(), 1), UserError);
  EXPECT_THROW(initialise_rows(RowInit::random, e * std::nan(""), {}, z, 2, quick(), 1), UserError);
  EXPECT_THROW(initialise_rows(RowInit::random, e, {}, z.slice(0, 0, 0), 2, quick(), 1), UserError);
}

}  // namespace
}  // namespace moegraft::graft
