#include "moegraft/adapters/modality_lora.h"
#include "moegraft/graft/initialise_lora.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::graft {
namespace {

using adapters::FactorInit;

at::Tensor cloud(int64_t n, int64_t d, uint64_t seed) {
  Rng rng(seed, "test.lora");
  at::Tensor x = at::empty({n, d}, at::kFloat);
  for (int64_t i = 0; i < n * d; ++i) x.mutable_data_ptr<float>()[i] = float(rng.normal());
  return x;
}

ot::OtConfig quick() {
  ot::OtConfig ot;
  ot.epsilon = {0.05, 0.01};
  return ot;
}

TEST(KaimingA, BoundsAndVariance) {
  const at::Tensor a = kaiming_A({4, 64, 48}, 1, "x");
  const double bound = 1.0 / std::sqrt(48.0);
  EXPECT_LE(a.abs().max().item<double>(), bound);
  EXPECT_GT(a.abs().max().item<double>(), 0.99 * bound);
  EXPECT_NEAR(a.var().item<double>(), bound * bound / 3, 0.03 * bound * bound / 3);
  EXPECT_TRUE(at::equal(a, kaiming_A({4, 64, 48}, 1, "x")));
  EXPECT_FALSE(at::equal(a, kaiming_A({4, 64, 48}, 1, "y")));
  EXPECT_FALSE(at::equal(a, kaiming_A({4, 64, 48}, 2, "x")));
}

TEST(GwSubspace, NormRankAndDeterminism) {
  GwSubspaceReport report;
  for (const int64_t n : {20, 60}) {  // narrower and wider than the width: both ridge forms
    const at::Tensor x_v = cloud(n, 32, 1), x_t = cloud(50, 32, 2) * 2.0 + 1.0;
    const at::Tensor a = gw_subspace_A(x_v, x_t, 8, quick(), 3, &report);
    EXPECT_EQ(a.sizes(), (std::vector<int64_t>{8, 32}));
    EXPECT_TRUE(at::allclose(a.norm(2, {1}), at::full({8}, std::sqrt(1.0 / 3.0)), 1e-5));
    EXPECT_EQ(report.directions, 8);
    EXPECT_GT(at::linalg_svdvals(a)[7].item<double>(), 1e-4);
    EXPECT_TRUE(at::equal(a, gw_subspace_A(x_v, x_t, 8, quick(), 3)));
    EXPECT_FALSE(at::allclose(a, activation_svd_A(x_v, 8, 3)));
  }
}

TEST(GwSubspace, FindsTheStretchedDirectionsOfAnIsometricCopy) {
  // x_v = x_t turned by R. Then M is (nearly) R^T, aligned states are x_t's, and A x = U^T M x reads x_v along R u: u
  // the top directions of x_t.
  const at::Tensor scale = at::tensor({9.0, 6.0, 3.0, 0.3, 0.2, 0.1}, at::kFloat), x_t = cloud(60, 6, 4) * scale;
  const at::Tensor turn = std::get<0>(at::linalg_qr(cloud(6, 6, 5)));
  const at::Tensor x_v = at::mm(x_t, turn).index_select(0, at::tensor(Rng(6, "test.order").permutation(60), at::kLong));
  ot::OtConfig ot;
  ot.epsilon = {0.05, 0.01, 0.002, 0.0005};
  GwSubspaceReport report;
  const at::Tensor a = gw_subspace_A(x_v, x_t, 2, ot, 1, &report);
  EXPECT_LT(report.row_perplexity, 60.0 / 6);  // a blunt plan (60) would find the mean only
  // The span of A's rows is that of the two directions of most variance of x_v.
  const at::Tensor top = turn.slice(0, 0, 2);
  const at::Tensor inside = at::mm(a, top.t());
  EXPECT_GT((inside.norm() / a.norm()).item<double>(), 0.98);
}

TEST(GwSubspace, WideStatesNeedNoSquareMatrix) {
  // Columns of zeros change no distance, no ridge and no direction: 60 columns take the one form, the same with 2,000
  // more the other.
  const at::Tensor x_v = cloud(40, 60, 8), x_t = cloud(50, 60, 9), zeros = at::zeros({50, 2000});
  const at::Tensor narrow = gw_subspace_A(x_v, x_t, 8, quick(), 3),
                   wide =
                       gw_subspace_A(at::cat({x_v, zeros.slice(0, 0, 40)}, 1), at::cat({x_t, zeros}, 1), 8, quick(), 3);
  EXPECT_TRUE(at::allclose(narrow, wide.slice(1, 0, 60), 1e-5, 1e-6));
  EXPECT_EQ(wide.slice(1, 60, 2060).abs().max().item<double>(), 0.0);
}

TEST(GwSubspace, DegenerateStatesFallBackToKaiming) {
  GwSubspaceReport report;
  const at::Tensor x_v = at::ones({10, 6});  // one direction only
  const at::Tensor a = gw_subspace_A(x_v, cloud(12, 6, 7), 4, quick(), 1, &report);
  EXPECT_TRUE(a.isfinite().all().item<bool>());
  EXPECT_EQ(report.directions, 1);
  EXPECT_TRUE(gw_subspace_A(at::zeros({10, 6}), cloud(12, 6, 7), 4, quick(), 1, &report).isfinite().all().item<bool>());
  EXPECT_EQ(report.directions, 0);
  EXPECT_THROW(gw_subspace_A(x_v, cloud(12, 5, 7), 4, quick(), 1), UserError);
  EXPECT_THROW(gw_subspace_A(x_v * std::nan(""), cloud(12, 6, 7), 4, quick(), 1), UserError);
  EXPECT_THROW(gw_subspace_A(at::empty({0, 6}), cloud(12, 6, 7), 4, quick(), 1), UserError);
}

TEST(Calibration, ReservoirKeepsAUniformDeterministicSample) {
  Calibration a(50, 1), b(50, 1);
  // Two experts, text and one new modality; every row's first entry is its number.
  for (int64_t call = 0; call < 20; ++call) {
    const at::Tensor rows =
        (at::arange(60, at::kFloat) + 60.0 * double(call)).unsqueeze(1).expand({60, 3}).contiguous();
    for (Calibration* c : {&a, &b}) c->observe_experts(2, model::Site::gate, rows, {0, 40, 50, 50, 60}, 2);
  }
  EXPECT_EQ(a.seen(2, model::Site::gate, 0, 0), 800);
  EXPECT_EQ(a.seen(2, model::Site::up, 0, 1), 200);
  EXPECT_EQ(a.seen(2, model::Site::gate, 1, 0), 0);
  EXPECT_FALSE(a.rows(2, model::Site::gate, 1, 0).defined());
  EXPECT_FALSE(a.rows(3, model::Site::gate, 0, 0).defined());
  const at::Tensor kept = a.rows(2, model::Site::up, 0, 0);
  EXPECT_EQ(kept.sizes(), (std::vector<int64_t>{50, 3}));
  EXPECT_TRUE(at::equal(kept, b.rows(2, model::Site::up, 0, 0)));
  // Rows 0..39 of each call: the mean number of a uniform sample is 589.5, standard error 347/sqrt(50) = 49.
  EXPECT_NEAR(kept.select(1, 0).mean().item<double>(), 589.5, 4 * 49.0);
  EXPECT_LT(at::fmod(kept.select(1, 0), 60).max().item<double>(), 40.0);
  EXPECT_EQ(std::get<0>(at::_unique(kept.select(1, 0))).size(0), 50);
  EXPECT_EQ(a.pool(2, model::Site::gate, 1).size(0), 50);
  EXPECT_FALSE(a.pool(2, model::Site::down, 1).defined());
  EXPECT_THROW(Calibration(0, 1), UserError);
}

TEST(Calibration, KeepsRowsInTheDtypeThatTheyComeIn) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    Calibration c(40, 1);
    const at::Tensor rows = cloud(60, 8, 3).to(dtype);
    c.observe_experts(0, model::Site::down, rows, {0, 20, 60},
                      2);  // 20 of text, 40 of the new modality: all are kept, in order
    EXPECT_EQ(c.rows(0, model::Site::down, 0, 1).scalar_type(), dtype);
    EXPECT_TRUE(at::equal(c.rows(0, model::Site::down, 0, 0), rows.slice(0, 0, 20)));
    EXPECT_TRUE(at::equal(c.rows(0, model::Site::down, 0, 1), rows.slice(0, 20, 60)));
  }
}

TEST(CalibrationPlan, FitsItsBound) {
  model::DecoderSpec spec;  // Qwen3-30B-A3B
  spec.hidden_size = 2048, spec.num_layers = 48, spec.num_experts = 128, spec.moe_intermediate_size = 768;
  spec.layers.assign(48, {});
  run::RunConfig config;
  config.model.dtype = "bfloat16";
  config.modalities["image"] = {};
  EXPECT_EQ(plan_calibration(spec, config).rows, 0) << "nobody asks";
  config.adapters.resize(1);
  EXPECT_EQ(plan_calibration(spec, config).rows, 0) << "kaiming_zero needs no states";
  config.adapters[0].init = FactorInit::gw_subspace;
  const int64_t row = 48 * 128 * 2 * (2048 + 768) * 2, gib = int64_t{1} << 30;
  const CalibrationPlan plan = plan_calibration(spec, config);
  EXPECT_EQ(plan.rows, 4 * gib / row);
  EXPECT_EQ(plan.rows, 62);
  EXPECT_EQ(plan.wanted, 256);
  EXPECT_EQ(plan.bytes, 62 * row);
  EXPECT_EQ(plan.num_solves(), 2 * 48 * 128);  // gate and up are one
  ASSERT_EQ(plan.solves.size(), 2u);
  EXPECT_EQ(plan.solves[0].width, 2048);
  EXPECT_EQ(plan.solves[1].width, 768);
  config.adapters[0].init = FactorInit::activation_svd;
  EXPECT_EQ(plan_calibration(spec, config).bytes, 62 * row);
  EXPECT_EQ(plan_calibration(spec, config).num_solves(), 0);
  EXPECT_EQ(estimate_solve_seconds(plan_calibration(spec, config), quick()), 0);
  config.adapters[0].init = FactorInit::gw_subspace;
  config.model.dtype = "float32";
  EXPECT_EQ(plan_calibration(spec, config).rows, 31);
  config.ot.calibration_gib = 1000;
  EXPECT_EQ(plan_calibration(spec, config).rows, 256);
  config.adapters[0].rank = 300, config.adapters[0].layers = {0, 3}, config.adapters[0].sites = {"up", "q"};
  EXPECT_EQ(plan_calibration(spec, config).rows, 300);
  EXPECT_EQ(plan_calibration(spec, config).num_solves(), 2 * 128);
  config.ot.calibration_gib = 4;
  try {
    plan_calibration(spec, config);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("ot.calibration_gib: 4 GiB hold 31 rows"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("rank 300"), std::string::npos) << e.what();
  }
  config.adapters[0].init_from = "runs/earlier";
  EXPECT_EQ(plan_calibration(spec, config).rows, 0);

  spec.num_layers = 2, spec.num_experts = 3, spec.hidden_size = 24, spec.moe_intermediate_size = 16;
  spec.layers.assign(2, {});
  config = {};
  config.adapters.resize(1);
  config.adapters[0].init = FactorInit::gw_subspace, config.adapters[0].rank = 4;
  EXPECT_GT(estimate_solve_seconds(plan_calibration(spec, config), quick()), 0);
}

TEST(InitialiseLora, FillsEverySiteAndKeepsBZero) {
  model::DecoderSpec spec;
  spec.hidden_size = 24;
  spec.num_layers = 2;
  spec.num_heads = 2;
  spec.num_kv_heads = 1;
  spec.head_dim = 8;
  spec.num_experts = 3;
  spec.num_experts_per_tok = 1;
  spec.moe_intermediate_size = 16;
  spec.layers.resize(2);
  adapters::AdapterConfig config;
  config.rank = 4;
  Calibration calibration(32, 1);
  for (int64_t layer = 0; layer < 2; ++layer) {
    // Expert 2 sees two new rows only: it must use the pool.
    calibration.observe_experts(layer, model::Site::gate, cloud(152, 24, uint64_t(layer)),
                                {0, 30, 60, 90, 120, 150, 152}, 2);
    if (layer == 0)
      calibration.observe_experts(layer, model::Site::down, cloud(150, 16, 9), {0, 30, 60, 90, 120, 150, 150}, 2);
  }
  for (const auto& [value, method, meaning, needs_calibration, needs_ot] : adapters::kFactorInits) {
    adapters::ModalityLora lora(spec, config, 0, {1}, at::kCPU), again(spec, config, 0, {1}, at::kCPU);
    ::testing::internal::CaptureStderr();
    const auto report = nlohmann::json::parse(initialise_lora(lora, value, &calibration, 1, quick(), 5));
    const bool told = ::testing::internal::GetCapturedStderr().find("experts 12/12") !=
                      std::string::npos;  // 2 layers x 3 experts x (gate with up, down)
    EXPECT_EQ(told, needs_calibration);
    initialise_lora(again, value, &calibration, 1, quick(), 5);
    EXPECT_EQ(report["method"], method);
    ASSERT_EQ(lora.factors().size(), 14u);
    for (size_t i = 0; i < lora.factors().size(); ++i) {
      const auto& f = lora.factors()[i];
      EXPECT_EQ(f.B.abs().max().item<double>(), 0.0) << f.name;
      EXPECT_TRUE(at::equal(f.A, again.factors()[i].A)) << f.name;
      EXPECT_NEAR(f.A.square().sum(-1).mean().item<double>(), 1.0 / 3.0, 0.12) << method << " " << f.name;
      EXPECT_TRUE(f.A.requires_grad()) << f.name;
      if (f.A.dim() == 3) { EXPECT_FALSE(at::equal(f.A[0], f.A[1])) << f.name; }
    }
    if (!needs_calibration) continue;
    EXPECT_EQ(report["sites"]["adapters.0.layers.0.gate"]["from_pool"], 1);
    EXPECT_EQ(report["sites"]["adapters.0.layers.0.gate"]["kaiming_fallback"], 0);
    EXPECT_EQ(report["sites"]["adapters.0.layers.1.down"]["kaiming_fallback"], 3);  // never observed
  }
  adapters::ModalityLora lora(spec, config, 0, {1}, at::kCPU);
  EXPECT_THROW(initialise_lora(lora, FactorInit::activation_svd, nullptr, 1, quick(), 5), InvariantError)
      << "no calibration";
}

TEST(InitialiseLora, TextIsReadOnlyWhereItIsCoupled) {
  model::DecoderSpec spec;
  spec.hidden_size = 24, spec.num_layers = 1, spec.num_experts = 1, spec.moe_intermediate_size = 16;
  spec.layers.resize(1);
  adapters::AdapterConfig config;
  config.rank = 4, config.sites = {"gate"};
  Calibration calibration(32, 1);
  calibration.observe_experts(0, model::Site::gate, cloud(30, 24, 1), {0, 0, 30}, 2);  // of the new modality alone
  for (const auto& [method, fallback] : {std::pair(FactorInit::gw_subspace, 1), {FactorInit::activation_svd, 0}}) {
    adapters::ModalityLora lora(spec, config, 0, {1}, at::kCPU);
    const auto report = nlohmann::json::parse(initialise_lora(lora, method, &calibration, 1, quick(), 5));
    EXPECT_EQ(report["sites"]["adapters.0.layers.0.gate"]["kaiming_fallback"], fallback) << config::name_of(method);
  }
}

}  // namespace
}  // namespace moegraft::graft
