// A new run whose calibration has less room: the same bytes while everything fits, fewer rows where it does not, an
// error where ranks do not fit.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/graft/calibration.h"
#include "moegraft/io/json.h"
#include "moegraft/model/weights.h"
#include "moegraft/train/trainer.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

TEST(CalibrationBound, ChangesNothingUntilRowsDoNotFit) {
  const testing::TemporaryFolder folder;
  testing::TinyOptions options;
  options.layers = 1;
  auto world = testing::make_tiny_world(folder.path(), options);
  world.config.adapters[0].init = adapters::FactorInit::gw_subspace;
  world.config.ot.epsilon = {0.1};
  world.config.ot.max_iterations = 3;
  const auto initialised = [&](const std::string& dtype, double gib) {
    auto other = world;
    other.config.model.dtype = dtype;
    other.config.ot.calibration_gib = gib;
    other.run = other.dir / (dtype + std::to_string(gib));
    other.config.run.dir = other.run.string();
    return testing::read_parameters(testing::write_run(other));
  };
  for (const std::string dtype : {"float32", "bfloat16"}) {
    run::RunConfig config = world.config;
    config.model.dtype = dtype;
    const model::DecoderSpec spec = model::read_spec(world.base);
    const double all = double(graft::plan_calibration(spec, config).bytes) / double(1 << 30);
    EXPECT_EQ(graft::plan_calibration(spec, config).rows, 256);
    const auto ample = initialised(dtype, 1000), exact = initialised(dtype, all * 1.0001),
               tight = initialised(dtype, all / 8);
    int64_t moved = 0;
    for (const auto& [name, tensor] : ample) {
      EXPECT_TRUE(at::equal(tensor, exact.at(name))) << name;
      EXPECT_TRUE(tight.at(name).isfinite().all().item<bool>()) << name;
      moved += !at::equal(tensor, tight.at(name));
    }
    EXPECT_GT(moved, 0) << "32 rows of each expert are another sample";
  }
  world.config.ot.calibration_gib = 1e-6;
  EXPECT_THROW(train(world.config), UserError);
  EXPECT_FALSE(std::filesystem::exists(world.config.run.dir)) << "told before anything is made";
}

}  // namespace
}  // namespace moegraft::train
