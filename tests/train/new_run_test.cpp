// A new run of several processes: what rank 0 loads to make it, and that its overlays do not show it.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/config/config.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/json.h"
#include "moegraft/train/trainer.h"
#include "support/tiny_world.h"
#include "train/startup.h"

namespace moegraft::train {
namespace {

using adapters::FactorInit;
using model::Experts;
using moegraft::testing::TemporaryFolder;

io::TensorMap overlays(const run::RunConfig& config, std::optional<Experts> experts) {
  graft::OpenOptions options;
  options.experts = experts;
  const graft::GraftedModel m = graft::build_model(config, options);
  io::TensorMap out;
  for (const auto& p : m.registry->all()) out[p.name] = p.tensor.detach().clone();
  return out;
}

void expect_same(const io::TensorMap& a, const io::TensorMap& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) EXPECT_TRUE(at::equal(tensor, b.at(name))) << name;
}

TEST(NewRun, LoadsOfTheExpertsWhatItsInitialisationsNeed) {
  run::RunConfig config;
  config.adapters.resize(2);
  EXPECT_EQ(experts_of_new_run(config, true), Experts::absent);
  EXPECT_EQ(experts_of_new_run(config, false), Experts::absent);
  config.adapters[1].init = FactorInit::gw_subspace;
  EXPECT_EQ(experts_of_new_run(config, true), std::nullopt) << "one GPU holds the whole base";
  for (const int who : {0, 1, 2}) {
    run::RunConfig large = config;
    if (who == 0) large.parallel.expert = 2;
    if (who == 1) large.parallel.shard_base = true;
    if (who == 2) large.model.offload = model::Offload::experts;
    EXPECT_EQ(experts_of_new_run(large, true), Experts::mapped);
    EXPECT_EQ(experts_of_new_run(large, false), std::nullopt) << "mapped already";
  }
  config.adapters[1].init_from = "runs/other";
  EXPECT_EQ(experts_of_new_run(config, true), Experts::absent);
}

TEST(NewRun, ItsOverlaysAreTheSameWhereverTheExpertsAre) {
  const TemporaryFolder folder;
  run::RunConfig config = moegraft::testing::make_tiny_world(folder.path()).config;
  for (auto& a : config.adapters) a.init = FactorInit::kaiming_zero;
  expect_same(overlays(config, Experts::absent), overlays(config, {}));
  ASSERT_FALSE(config.adapters.empty());
  config.adapters[0].init = FactorInit::gw_subspace;
  config.ot.calibration_tokens = 64;
  const io::TensorMap visiting = overlays(config, Experts::offloaded);
  expect_same(overlays(config, Experts::mapped), visiting);
  EXPECT_THROW(overlays(config, Experts::absent), InvariantError) << "calibration runs the model";
  config.adapters[0].sites = {"q", "v"};  // attention starts from Kaiming's, which asks for no calibration
  const io::TensorMap attention = overlays(config, Experts::absent);
  config.adapters[0].init = FactorInit::kaiming_zero;
  expect_same(attention, overlays(config, Experts::absent));
}

// As a user writes it: calibrated on the run's documents, without a Gromov-Wasserstein solve.
TEST(NewRun, StartsFromTheActivationsTopDirections) {
  const TemporaryFolder folder;
  const auto world = moegraft::testing::make_tiny_world(folder.path());
  const auto start_of = [&](const std::string& init) {
    const std::string dir = (folder.path() / init).string();
    train(config::parse<run::RunConfig>(config::Document::from_file(
        world.yaml.string(),
        {"run.dir=" + dir, "adapters[0].init=" + init, "ot.calibration_tokens=64", "train.steps=1"})));
    return dir;
  };
  const std::filesystem::path svd = start_of("activation_svd"), kaiming = start_of("kaiming_zero");
  const io::Json report = io::read_json(svd / "init.json").at("adapters").at(0);
  EXPECT_EQ(report.at("method"), "activation_svd");
  EXPECT_FALSE(report.at("sites").empty());
  for (const auto& [name, site] : report.at("sites").items()) EXPECT_FALSE(site.contains("objective")) << name;
  const auto first = [](const std::filesystem::path& run) {
    return checkpoint::load(run / "checkpoints" / checkpoint::step_name(0)).parameters;
  };
  const auto a = first(svd), b = first(kaiming);
  for (const auto& [name, tensor] : a) {
    if (!name.ends_with(".A")) continue;
    const bool expert = tensor.dim() == 3;
    EXPECT_EQ(at::equal(tensor, b.at(name)), !expert) << name;
  }
}

}  // namespace
}  // namespace moegraft::train
