// A run goes on only with what it was made from, and never over what could still be gone on from.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/data/prepare.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/run/records.h"
#include "moegraft/train/trainer.h"
#include "support/tiny_world.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::make_tiny_world;
using moegraft::testing::TemporaryFolder;
using moegraft::testing::TinyWorld;

std::string error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const UserError& e) { return e.what(); }
  return "no error";
}

// One value of one tensor of a safetensors file becomes another; everything else stays.
void change_one_value(const fs::path& file) {
  io::TensorMap tensors;
  std::map<std::string, std::string> metadata;
  {
    const io::SafetensorsFile source(file);
    metadata = source.metadata();
    for (const auto& name : source.names()) tensors[name] = source.tensor(name).clone();
  }
  for (auto& [name, t] : tensors)
    if (t.is_floating_point()) {
      t.view({-1})[t.numel() / 2] += 0.25;
      break;
    }
  io::save_safetensors(file, tensors, metadata);
}

struct World {
  World() : world(make_tiny_world(folder.path())), config(world.config) {
    config.train.steps = 2, config.checkpoint.every = 2, config.train.sample_prompts.clear();
  }
  // Other captions for the same pictures: as many documents, of other contents.
  void make_other_data() const {
    std::string text = io::read_file(world.manifest);
    for (size_t at = text.find("\"a "); at != std::string::npos; at = text.find("\"a ", at + 1))
      text.replace(at, 3, "\"o ");
    io::write_file_atomic(world.manifest, text);
    data::ShardOptions o;
    o.tokenizer = world.tokenizer, o.codec = world.codec, o.manifests = {world.manifest}, o.output = world.image_shards,
    o.overwrite = true;
    data::prepare_shards(o);
  }
  TemporaryFolder folder;
  TinyWorld world;
  run::RunConfig config;
};

TEST(Identity, WhatChangedIsNamedAndRefused) {
  struct Case {
    const char* name;
    void (*change)(const World&);
    const char *resume, *open;  // what is said; "no error" where it goes on
  };
  const Case cases[] = {
      {"nothing", [](const World&) {}, "no error", "no error"},
      {"the base's weights", [](const World& w) { change_one_value(w.world.base / "model.safetensors"); }, "base ",
       "base "},
      {"the base's config",
       [](const World& w) {
         auto j = io::read_json(w.world.base / "config.json");
         j["rms_norm_eps"] = 1e-3;
         io::write_json(w.world.base / "config.json", j);
       },
       "base ", "base "},
      {"the codec", [](const World& w) { change_one_value(w.world.codec / "model.safetensors"); }, "codec",
       "codec.image "},
      {"data of as many documents", [](const World& w) { w.make_other_data(); }, "--accept-changed data", "no error"},
      {"nothing but the base's place",
       [](const World& w) {
         fs::rename(w.world.base, w.world.dir / "elsewhere");
         fs::create_directory_symlink(w.world.dir / "elsewhere", w.world.base);
       },
       "no error", "no error"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.name);
    World w;
    train(w.config);
    const auto before = checkpoint::list_checkpoints(w.world.run / "checkpoints");
    c.change(w);
    const std::string opened = error_of([&] { graft::open_model(w.world.run); });
    EXPECT_NE(opened.find(c.open), std::string::npos) << opened;
    w.config.train.steps = 4;
    const std::string resumed = error_of([&] { train(w.config, "auto"); });
    EXPECT_NE(resumed.find(c.resume), std::string::npos) << resumed;
    if (std::string(c.resume) != "no error") {
      EXPECT_EQ(checkpoint::list_checkpoints(w.world.run / "checkpoints"), before) << "a refusal changes nothing";
    }
  }
}

TEST(Identity, ChangedDataCanBeAccepted) {
  World w;
  train(w.config);
  w.make_other_data();
  w.config.train.steps = 4;
  EXPECT_EQ(train(w.config, "auto", nullptr, /*accept_data=*/true).step, 4);
  EXPECT_TRUE(run::read_run_record(w.world.run).sessions.back().accepted);
}

TEST(Identity, AcceptedDataMayHaveMoreDocuments) {
  World w;
  train(w.config);
  const std::string text = io::read_file(w.world.manifest);
  io::write_file_atomic(w.world.manifest, text + text);
  w.make_other_data();
  w.config.train.steps = 4;
  const std::string refused = error_of([&] { train(w.config, "auto"); });
  EXPECT_NE(refused.find("--accept-changed data"), std::string::npos) << refused;
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(train(w.config, "auto", nullptr, /*accept_data=*/true).step, 4);
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("data.train is read from its beginning"), std::string::npos);
  w.config.train.steps = 6;
  EXPECT_EQ(train(w.config, "auto").step, 6) << "the accepted data is the run's from now on";
}

// A run that saved step 0 and failed before it trained: what is wrong with its config is mended where it is.
TEST(Identity, ARunThatTrainedNothingIsTakenOverByACorrectedConfig) {
  World w;
  std::erase_if(w.config.data.train,
                [&](const data::SourceConfig& source) { return source.path != w.world.image_shards.string(); });
  ASSERT_EQ(w.config.data.train.size(), 1u);
  w.config.data.sequence_length = 4;
  EXPECT_NE(error_of([&] { train(w.config); }).find("no document fits"), std::string::npos);
  ASSERT_FALSE(checkpoint::list_checkpoints(w.world.run / "checkpoints").empty()) << "else this shows nothing";
  w.config.data.sequence_length = 64;
  const std::string refused = error_of([&] { train(w.config); });
  EXPECT_NE(refused.find("it has trained no step yet, so a corrected config begins anew there"), std::string::npos)
      << refused;
  EXPECT_EQ(train(w.config, "auto").step, 2);
  w.config.data.sequence_length = 32;
  EXPECT_NE(error_of([&] { train(w.config, "auto"); }).find("must keep data.sequence_length"), std::string::npos);
}

TEST(Identity, ShardsOfAnotherCodecAreRefused) {
  World w;
  change_one_value(w.world.codec / "model.safetensors");
  const std::string error = error_of([&] { train(w.config); });
  EXPECT_NE(error.find("was made with another codec than this run's " + w.world.codec.string()), std::string::npos)
      << error;
  EXPECT_FALSE(fs::exists(w.world.run)) << "a start that fails leaves no run";
}

TEST(Identity, AdaptersOfAnotherBaseAreNoStart) {
  World w;
  train(w.config);
  change_one_value(w.world.base / "model.safetensors");
  run::RunConfig next = w.config;
  next.run.dir = (w.world.dir / "next").string();
  next.adapters[0].init_from = w.world.run.string();
  const std::string error = error_of([&] { train(next); });
  EXPECT_NE(error.find("adapters[0].init_from"), std::string::npos) << error;
  EXPECT_NE(error.find("base "), std::string::npos) << error;
}

TEST(Branch, AnOlderCheckpointContinuesInARunOfItsOwn) {
  World w;
  w.config.train.steps = 6, w.config.checkpoint = {2, 10, false};
  train(w.config);
  const fs::path old = w.world.run / "checkpoints/step-00000002";
  const auto before = checkpoint::list_checkpoints(w.world.run / "checkpoints");
  const std::string refused = error_of([&] { train(w.config, old.string()); });
  EXPECT_NE(refused.find("newer checkpoints (step-00000004, step-00000006)"), std::string::npos) << refused;
  EXPECT_EQ(checkpoint::list_checkpoints(w.world.run / "checkpoints"), before);

  run::RunConfig branch = w.config;
  branch.run.dir = (w.world.dir / "branch").string();
  EXPECT_EQ(train(branch, old.string()).step, 6);
  const auto last = [](const fs::path& run) {
    return io::read_file(run / "checkpoints/step-00000006/adapter.safetensors");
  };
  EXPECT_EQ(last(branch.run.dir), last(w.world.run)) << "the same steps give the same bytes";
  EXPECT_TRUE(fs::exists(fs::path(branch.run.dir) / "checkpoints/step-00000002"))
      << "a kill before the next checkpoint loses nothing";
  EXPECT_EQ(run::read_run_record(branch.run.dir).branched_from, fs::absolute(old).lexically_normal().string());
  std::vector<int64_t> steps;
  for (const auto& line : run::read_metrics(fs::path(branch.run.dir) / "metrics.jsonl").training)
    steps.push_back(line.step);
  EXPECT_EQ(steps, (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(checkpoint::list_checkpoints(w.world.run / "checkpoints"), before);

  branch.run.dir = (w.world.dir / "other").string(), branch.run.seed = 99;
  EXPECT_NE(error_of([&] { train(branch, old.string()); }).find("run.seed"), std::string::npos);
  EXPECT_FALSE(fs::exists(branch.run.dir));
}

TEST(Branch, DamagedCheckpointsAreKeptAsideAndNotCounted) {
  World w;
  w.config.train.steps = 6, w.config.checkpoint = {2, 2, false};
  train(w.config);
  const fs::path root = w.world.run / "checkpoints";
  std::ofstream(root / "step-00000006/adapter.safetensors", std::ios::app) << "x";
  w.config.train.steps = 8;
  EXPECT_EQ(train(w.config, "auto").step, 8);
  EXPECT_TRUE(fs::exists(root / "damaged-step-00000006"));
  for (const auto& dir : checkpoint::list_checkpoints(root))
    std::ofstream(dir / "adapter.safetensors", std::ios::app) << "x";
  const std::string lines = io::read_file(w.world.run / "metrics.jsonl");
  w.config.train.steps = 10;
  EXPECT_NE(error_of([&] { train(w.config, "auto"); }).find("every checkpoint in"), std::string::npos);
  EXPECT_EQ(io::read_file(w.world.run / "metrics.jsonl"), lines) << "nothing is cut back";
}

TEST(Start, AFailedOneLeavesRoomForACorrectedConfig) {
  World w;
  run::RunConfig wrong = w.config;
  wrong.data.train[0].path = "/nowhere";
  EXPECT_NE(error_of([&] { train(wrong); }).find("data source not found: /nowhere"), std::string::npos);
  EXPECT_EQ(train(w.config).step, 2);
  EXPECT_TRUE(train(w.config, "auto").ended_before);
}

TEST(Start, StrictEndsWhatLearnsNothing) {
  World w;
  w.config.data.train = {{w.world.text_shards.string(), 1.0}};
  w.config.train.steps = 20;
  w.config.train.strict = true;
  const std::string error = error_of([&] { train(w.config); });
  EXPECT_NE(error.find("train.strict: ended after step"), std::string::npos) << error;
  const auto record = run::read_run_record(w.world.run);
  const auto& warnings = record.warnings.value();
  EXPECT_TRUE(std::any_of(warnings.begin(), warnings.end(), [](const auto& w) { return w.check == "zero_gradient"; }));
  EXPECT_FALSE(record.trainable.value().empty());
  w.config.train.strict = false;
  EXPECT_EQ(train(w.config, "auto").step, 20) << "what was done is saved";

  World at_once;
  at_once.config.train.warmup = 100, at_once.config.train.strict = true;
  const std::string message = error_of([&] { train(at_once.config); });
  EXPECT_NE(message.find("train.strict: ended before its first step by the warning above (warmup)"), std::string::npos)
      << message;
  at_once.config.train.warmup = 0;
  EXPECT_EQ(train(at_once.config).step, 2) << "nothing was saved: the corrected config takes the directory over";
}

}  // namespace
}  // namespace moegraft::train
