// A run on one set of shards that holds two modalities of images, with a codec each.
#include <gtest/gtest.h>

#include <cmath>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/codec/vq.h"
#include "moegraft/data/prepare.h"
#include "moegraft/data/shard.h"
#include "moegraft/generate/images.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/files.h"
#include "moegraft/train/trainer.h"
#include "support/metrics.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::make_tiny_world;
using moegraft::testing::TemporaryFolder;
using moegraft::testing::TinyWorld;

template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) { return e.what(); }
  return "";
}

// 6 x 6 codes of 9, beside the world's 2 x 2 of 16.
void write_fine_codec(const fs::path& dir, uint64_t seed) {
  codec::VqConfig c;
  c.image_size = 12, c.patch = 2, c.channels = {8}, c.encoder_blocks = {0}, c.decoder_blocks = {0};
  c.mixer_blocks = 1, c.mixer_width = 8, c.codebook_size = 9, c.code_width = 4;
  codec::VqCodec(c, seed).save(dir);
}

// Pictures of one modality, of the other, and of both in one document.
run::RunConfig make_run(const TinyWorld& w) {
  write_fine_codec(w.dir / "fine", 5);
  std::string lines;
  for (const std::string colour : {"red", "green", "blue", "black"}) {
    const std::string disc = "images/" + colour + "-disc.png", bar = "images/" + colour + "-bar.png";
    lines += R"({"image": ")" + disc + R"(", "text": "a )" + colour +
             R"( disc"})"
             "\n";
    lines += R"({"segments": [{"text": "a )" + colour + R"( bar"}, {"image": ")" + bar +
             R"(", "modality": "fine"}]})"
             "\n";
    lines += R"({"segments": [{"text": "both"}, {"image": ")" + bar + R"("}, {"image": ")" + bar +
             R"(", "modality": "fine"}]})"
             "\n";
  }
  io::write_file_atomic(w.dir / "both.jsonl", lines);
  data::ShardOptions shards;
  shards.manifests = {w.dir / "both.jsonl"}, shards.tokenizer = w.tokenizer, shards.codec = w.codec,
  shards.codecs = {{"fine", w.dir / "fine"}}, shards.output = w.dir / "shards" / "both";
  data::prepare_shards(shards);
  run::RunConfig c = w.config;
  c.modalities["fine"].codec = (w.dir / "fine").string();
  c.modalities["fine"].begin = "<fine>", c.modalities["fine"].end = "</fine>";
  c.adapters[0].modality = {"image", "fine"};
  c.data.train = c.data.eval = {{(w.dir / "shards" / "both").string(), 1.0}};
  c.checkpoint = {2, 100, true};
  c.validate("");
  return c;
}

TEST(Modalities, ARunOnASetOfTwoTrainsResumesAndDraws) {
  TemporaryFolder folder;
  const TinyWorld w = make_tiny_world(folder.path());
  run::RunConfig whole = make_run(w), part = whole;
  part.run.dir = (w.dir / "part").string();
  train(whole);
  train(part);
  for (const auto& [step, loss] : moegraft::testing::training_column(whole.run.dir, "loss"))
    EXPECT_TRUE(std::isfinite(loss)) << step;
  fs::remove_all(fs::path(part.run.dir) / "checkpoints" / checkpoint::step_name(4));
  train(part, "auto");
  const auto bytes = [](const fs::path& run) {
    return io::read_file(*checkpoint::find_latest(run / "checkpoints") / "adapter.safetensors");
  };
  EXPECT_EQ(bytes(whole.run.dir), bytes(part.run.dir));

  const auto m = graft::open_model(whole.run.dir);
  ASSERT_EQ(m.vocabulary.modalities.size(), 2u);
  EXPECT_EQ(m.vocabulary.by_name("fine").item_length, 36);
  EXPECT_EQ(m.vocabulary.by_name("fine").num_codes, 9);
  EXPECT_EQ(m.vocabulary.by_name("image").item_length, 4);
  for (const char* name : {"fine", "image"}) {
    generate::ImageOptions options;
    options.modality = name;
    const auto drawn = generate::generate_images(m, std::vector<std::string>{"a red disc"}, options);
    EXPECT_EQ(drawn[0].ids_L.size(0), m.vocabulary.by_name(name).item_length);
    EXPECT_EQ(drawn[0].pixels_3HW.size(1), 12);
  }
}

TEST(Modalities, WhatDoesNotFitIsSaidBeforeTheRunIsMade) {
  TemporaryFolder folder;
  const TinyWorld w = make_tiny_world(folder.path());
  const run::RunConfig whole = make_run(w);
  run::RunConfig c = whole;
  c.modalities.erase("fine");
  c.adapters[0].modality = {"image"};
  const std::string lacking = message_of<UsageError>([&] { train(c); });
  EXPECT_NE(lacking.find("holds the modality \"fine\", which `modalities` lacks (image): add modalities.fine with the "
                         "codec that made it"),
            std::string::npos)
      << lacking;
  c = whole;
  write_fine_codec(w.dir / "other", 6);
  c.modalities["fine"].codec = (w.dir / "other").string();
  const std::string other = message_of<UserError>([&] { train(c); });
  EXPECT_NE(other.find("was made with another codec than this run's " + (w.dir / "other").string()), std::string::npos)
      << other;
  EXPECT_FALSE(fs::exists(whole.run.dir));
}

// Neither is called "image": the samples are of the first.
TEST(Modalities, SamplesAreDrawnWhateverTheModalityIsCalled) {
  TemporaryFolder folder;
  const TinyWorld w = make_tiny_world(folder.path());
  run::RunConfig c = make_run(w);
  data::ShardOptions shards;
  shards.manifests = {w.dir / "both.jsonl"}, shards.tokenizer = w.tokenizer, shards.codec = w.codec,
  shards.modality = "coarse", shards.codecs = {{"fine", w.dir / "fine"}}, shards.output = w.dir / "shards" / "renamed";
  data::prepare_shards(shards);
  c.modalities["coarse"] = c.modalities["image"];
  c.modalities.erase("image");
  c.adapters[0].modality = {"coarse", "fine"};
  c.data.train = c.data.eval = {{shards.output.string(), 1.0}};
  c.train.steps = 2;
  train(c);
  EXPECT_TRUE(fs::exists(fs::path(c.run.dir) / "samples" / (checkpoint::step_name(2) + ".png")));
}

}  // namespace
}  // namespace moegraft::train
