// What an earlier moegraft wrote loads: base, codec, shards, a run and its checkpoints (tests/golden/old_run, made at
// 69599a1).
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/evaluate/drift.h"
#include "moegraft/generate/images.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/batch.h"
#include "moegraft/routing/stats.h"
#include "moegraft/run/run_dir.h"
#include "moegraft/train/trainer.h"
#include "support/metrics.h"
#include "support/paths.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;

class OldRun : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::copy(fs::path(moegraft::test_source_dir()) / "tests/golden/old_run", folder_.path(),
             fs::copy_options::recursive);
    const fs::path config = folder_ / "run/config.yaml";
    std::string text = io::read_file(config);
    for (size_t at; (at = text.find("@WORLD@")) != std::string::npos;) text.replace(at, 7, folder_.path().string());
    io::write_file_atomic(config, text);
  }
  fs::path run() const { return folder_ / "run"; }
  const testing::TemporaryFolder folder_{"moegraft-old"};
};

double distance(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST_F(OldRun, OpensWithTheLogitsItHad) {
  const at::NoGradGuard no_grad;
  auto model = graft::open_model(run(), {});
  EXPECT_EQ(model.step, 6);
  const auto logits = [&](const char* name) {
    const fs::path expected = folder_ / "expected";
    model::PackedBatch batch =
        model::pack_rows(io::load_safetensors(expected / (std::string(name) + "-ids.safetensors")).at("input_ids"));
    batch.modality_T = (batch.ids_T >= model.vocabulary.text_size).to(at::kLong);
    const at::Tensor want = io::load_safetensors(expected / (std::string(name) + ".safetensors")).at("logits");
    return std::pair(
        model.decoder->all_logits(model.decoder->forward(batch).hidden_TD).view({want.size(0), want.size(1), -1}),
        want);
  };
  const auto [image, image_then] = logits("image");
  EXPECT_LT(distance(image, image_then), 1e-4);
  const auto [text, text_then] = logits("text");
  EXPECT_LT(distance(text.narrow(2, 0, text_then.size(2)), text_then), 1e-4);
  EXPECT_TRUE(evaluate::measure_drift(model, 1).exact());
  EXPECT_EQ(generate::generate_images(model, std::vector<std::string>{"a red disc"}, {})[0].pixels_3HW.sizes(),
            (std::vector<int64_t>{3, 12, 12}));
}

TEST_F(OldRun, ResumesWhereItStood) {
  const auto then = testing::training_column(run(), "loss");
  ASSERT_EQ(then.size(), 6u);
  EXPECT_FALSE(run::read_routing(run() / "routing.jsonl").empty());
  fs::remove_all(run() / "checkpoints" / checkpoint::step_name(6));
  run::RunConfig config = run::load_run_config(run());
  EXPECT_EQ(config.model.dtype, "float32") << "train.precision, which it had, is model.dtype now";
  train(config, "auto");
  const auto now = testing::training_column(run(), "loss");
  for (int64_t step = 1; step <= 6; ++step)
    EXPECT_NEAR(now.at(step), then.at(step), step <= 4 ? 0.0 : 1e-4) << "step " << step;
  EXPECT_EQ(graft::open_model(run(), {}).step, 6);
}

}  // namespace
}  // namespace moegraft::train
