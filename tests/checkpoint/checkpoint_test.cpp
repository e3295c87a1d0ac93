#include "moegraft/checkpoint/checkpoint.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/io/files.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("moegraft_checkpoint_" + std::to_string(getpid()) +
                                         testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  static io::TensorMap tensors(int64_t step, int64_t n = 64) {
    return {{"adapters.0.A", at::full({n, 4}, double(step), at::kFloat)},
            {"rows.image", at::arange(8, at::kFloat) + double(step)}};
  }
  static fs::path save(CheckpointWriter& writer, int64_t step, std::optional<double> measure = {}) {
    TrainState state;
    state.step = step;
    const auto dir =
        writer.save(step, whole(tensors(step)), {{"a.exp_avg", at::full({3}, double(step))}}, to_json(state), measure);
    writer.wait();
    return dir;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(root_)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }
  static void expect_contents(const fs::path& dir, int64_t step) {
    const auto loaded = load(dir);
    EXPECT_EQ(loaded.step, step);
    EXPECT_EQ(state_from_json(loaded.state).step, step);
    for (const auto& [name, tensor] : tensors(step)) EXPECT_TRUE(at::equal(loaded.parameters.at(name), tensor)) << name;
    EXPECT_TRUE(at::equal(loaded.optimizer.at("a.exp_avg"), at::full({3}, double(step))));
  }
  fs::path root_;
};

void flip_byte(const fs::path& path, int64_t offset_from_end) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(-offset_from_end, std::ios::end);
  const char byte = char(file.get() ^ 1);
  file.seekp(-offset_from_end, std::ios::end);
  file.put(byte);
}

TEST_F(CheckpointTest, RoundTrip) {
  CheckpointWriter writer(root_, {});
  const auto dir = save(writer, 100, 1.25);
  EXPECT_EQ(dir.filename(), "step-00000100");
  expect_contents(dir, 100);
  EXPECT_EQ(load(dir).measure, 1.25);
  EXPECT_EQ(find_latest(root_), dir);
  EXPECT_EQ(find_latest(root_ / "nothing"), std::nullopt);
}

// One process writes what it always wrote: sizes and checksums of every byte.
TEST_F(CheckpointTest, FilesOfOneProcessAreFixed) {
  CheckpointWriter writer(root_, {});
  const auto dir = writer.save(
      100, {{"adapters.0.B", at::arange(12, at::kFloat).reshape({3, 4})}, {"adapters.0.A", at::full({2, 3}, 0.5)}},
      {{"adapters.0.A.exp_avg.codes", at::arange(6, at::kByte)},
       {"adapters.0.A.step", at::full({}, 2.0)},
       {"steps", at::scalar_tensor(3, at::kLong)}},
      "{}\n", 1.25);
  writer.wait();
  EXPECT_EQ(io::read_file(dir / "manifest.json"), R"({
  "checksum": "679f9ce578d60686",
  "files": {
    "adapter.safetensors": {
      "checksum": "bfddc664848b5601",
      "size": 264
    },
    "optimizer.safetensors": {
      "checksum": "3d8a1a967788c2ce",
      "size": 274
    },
    "state.json": {
      "checksum": "7d441b099c11d3ba",
      "size": 3
    }
  },
  "format": "moegraft checkpoint",
  "measure": 1.25,
  "step": 100,
  "version": 1
}
)");
}

TEST_F(CheckpointTest, KeepsTheNewestAndTheBest) {
  CheckpointWriter writer(root_, {.every = 1, .keep = 2, .keep_best = true});
  const double measures[] = {5, 3, 4, 3, 6, 7};  // step 2 is best; step 4 only ties
  for (int64_t step = 1; step <= 6; ++step) save(writer, step, measures[step - 1]);
  EXPECT_EQ(names(), (std::vector<std::string>{"step-00000002", "step-00000005", "step-00000006"}));
  EXPECT_EQ(find_best(root_)->filename(), "step-00000002");
  save(writer, 7, 1.0);
  save(writer, 8);
  EXPECT_EQ(names(), (std::vector<std::string>{"step-00000007", "step-00000008"}));
  EXPECT_EQ(find_best(root_, /*lower_is_better=*/false)->filename(), "step-00000007") << "unmeasured ones do not count";
}

TEST_F(CheckpointTest, WithoutKeepBestOnlyTheNewest) {
  CheckpointWriter writer(root_, {.every = 1, .keep = 1, .keep_best = false});
  for (int64_t step = 1; step <= 3; ++step) save(writer, step, double(step));
  EXPECT_EQ(names(), (std::vector<std::string>{"step-00000003"}));
}

TEST_F(CheckpointTest, StepsBeyondEightDigitsSortByNumber) {
  CheckpointWriter writer(root_, {});
  save(writer, 99999999);
  save(writer, 100000000);
  EXPECT_EQ(find_latest(root_)->filename(), "step-100000000");
}

TEST_F(CheckpointTest, EveryKindOfDamageFallsBack) {
  struct Case {
    const char* what;
    std::function<void(const fs::path&)> damage;
  };
  const Case cases[] = {
      {"flipped bit in the data", [](const fs::path& d) { flip_byte(d / "adapter.safetensors", 1); }},
      {"flipped bit in the moments", [](const fs::path& d) { flip_byte(d / "optimizer.safetensors", 5); }},
      {"flipped bit in the state", [](const fs::path& d) { flip_byte(d / "state.json", 3); }},
      {"flipped digit in the manifest", [](const fs::path& d) { flip_byte(d / "manifest.json", 5); }},
      {"truncated data", [](const fs::path& d) { fs::resize_file(d / "adapter.safetensors", 100); }},
      {"truncated manifest", [](const fs::path& d) { fs::resize_file(d / "manifest.json", 30); }},
      {"empty manifest", [](const fs::path& d) { fs::resize_file(d / "manifest.json", 0); }},
      {"missing file", [](const fs::path& d) { fs::remove(d / "optimizer.safetensors"); }},
      {"missing manifest", [](const fs::path& d) { fs::remove(d / "manifest.json"); }},
      {"grown file", [](const fs::path& d) { fs::resize_file(d / "state.json", fs::file_size(d / "state.json") + 1); }},
  };
  for (const auto& test : cases) {
    SCOPED_TRACE(test.what);
    fs::remove_all(root_);
    CheckpointWriter writer(root_, {});
    save(writer, 1);
    const auto last = save(writer, 2);
    test.damage(last);
    EXPECT_FALSE(find_damage(last).empty());
    testing::internal::CaptureStderr();
    EXPECT_EQ(find_latest(root_)->filename(), "step-00000001");
    EXPECT_NE(testing::internal::GetCapturedStderr().find("step-00000002"), std::string::npos)
        << "the damaged one is named";
    EXPECT_THROW(load(last), UserError);
    // Training goes on from step 1 and writes step 2 again.
    save(writer, 2);
    EXPECT_EQ(find_latest(root_), last);
    expect_contents(last, 2);
    EXPECT_EQ(names().size(), 2u);
  }
}

// Else a run would begin again at its first step, over what may still be saved by hand.
TEST_F(CheckpointTest, AllDamagedIsAnError) {
  EXPECT_EQ(find_latest(root_), std::nullopt);
  CheckpointWriter writer(root_, {});
  fs::remove(save(writer, 1) / "manifest.json");
  fs::remove(save(writer, 2) / "state.json");
  testing::internal::CaptureStderr();
  try {
    find_latest(root_);
    ADD_FAILURE();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("every checkpoint in " + root_.string() +
                                         " is damaged (step-00000002: state.json is missing)"),
              std::string::npos)
        << e.what();
  }
  testing::internal::GetCapturedStderr();
}

TEST_F(CheckpointTest, LeftOversAreRemovedAndForeignFilesStay) {
  fs::create_directories(root_ / ".writing-step-00000007");
  fs::create_directories(root_ / ".removing-step-00000001" / "x");
  fs::create_directories(root_ / "step-by-step");
  CheckpointWriter writer(root_, {});
  EXPECT_EQ(names(), (std::vector<std::string>{"step-by-step"}));
  EXPECT_TRUE(list_checkpoints(root_).empty());
}

TEST_F(CheckpointTest, WhatIsSetAsideIsNeitherCountedNorRemoved) {
  CheckpointWriter writer(root_, {.every = 1, .keep = 2, .keep_best = false});
  for (int64_t step = 3; step <= 4; ++step) save(writer, step);
  writer.set_aside_after(2);
  for (int64_t step = 3; step <= 5; ++step) save(writer, step);
  writer.set_aside_after(4);
  EXPECT_EQ(names(), (std::vector<std::string>{"damaged-step-00000003", "damaged-step-00000004",
                                               "damaged-step-00000005", "step-00000004"}));
}

TEST_F(CheckpointTest, MappedTensorsOutliveTheirDirectory) {
  CheckpointWriter writer(root_, {});
  const auto loaded = load(save(writer, 3));
  fs::remove_all(root_);
  EXPECT_TRUE(at::equal(loaded.parameters.at("adapters.0.A"), tensors(3).at("adapters.0.A")));
}

// RLIMIT_FSIZE stands for a full disk: the write fails in the middle of a file.
TEST_F(CheckpointTest, FullDiskLosesNothing) {
  CheckpointWriter writer(root_, {.every = 1, .keep = 1, .keep_best = false});
  save(writer, 1);
  const auto previous = signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  rlimit tight = before;
  for (const rlim_t limit : {rlim_t(0), rlim_t(100), rlim_t(900)}) {
    tight.rlim_cur = limit;
    setrlimit(RLIMIT_FSIZE, &tight);
    std::string message;
    try {
      save(writer, 2);
    } catch (const UserError& e) { message = e.what(); }
    setrlimit(RLIMIT_FSIZE, &before);
    EXPECT_NE(message.find("step-00000002"), std::string::npos) << message;
    EXPECT_NE(message.find("File too large"), std::string::npos) << message;
    EXPECT_EQ(names(), (std::vector<std::string>{"step-00000001"})) << "limit " << limit;
    expect_contents(*find_latest(root_), 1);
  }
  signal(SIGXFSZ, previous);
  save(writer, 2);  // space again
  expect_contents(*find_latest(root_), 2);
}

TEST_F(CheckpointTest, FullDeviceNamesTheReason) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  CheckpointWriter writer(root_, {});
  save(writer, 1);
  EXPECT_THROW(CheckpointWriter("/dev/full/x", {}), UserError);
}

// A child saves step after step and dies by SIGKILL at a random moment, again and again. Whatever the moment, a whole
// checkpoint is found, it holds what belongs to its step, and it is not older than the last one reported done.
TEST_F(CheckpointTest, SurvivesSigkillAtAnyMoment) {
  constexpr int kRounds = 40;
  Rng rng(7, "kill");
  int64_t step = 1;
  {
    CheckpointWriter writer(root_, {});
    save(writer, step);
  }
  int64_t progressed = 0;
  for (int round = 0; round < kRounds; ++round) {
    int report[2];
    ASSERT_EQ(pipe(report), 0);
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      try {
        CheckpointWriter writer(root_, {.every = 1, .keep = 2, .keep_best = true});
        for (int64_t s = step + 1;; ++s) {
          save(writer, s, double((s * 7919) % 101));
          if (write(report[1], &s, sizeof s) != sizeof s) _exit(3);
        }
      } catch (...) { _exit(2); }
    }
    close(report[1]);
    // Every other round dies in its first save or before; the others some time after a first one, however slow the
    // machine.
    int64_t done = step;
    if (round % 2) { ASSERT_EQ(read(report[0], &done, sizeof done), ssize_t(sizeof done)); }
    std::this_thread::sleep_for(std::chrono::microseconds(rng.below(round % 2 ? 15000 : 30000)));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child failed by itself: " << status;
    for (int64_t s; read(report[0], &s, sizeof s) == sizeof s;) done = s;
    close(report[0]);

    for (const auto& dir : list_checkpoints(root_)) EXPECT_EQ(find_damage(dir), "") << dir;
    const auto latest = find_latest(root_);
    ASSERT_TRUE(latest.has_value());
    const int64_t found = load(*latest).step;
    EXPECT_GE(found, done);
    EXPECT_LE(found, done + 1);
    expect_contents(*latest, found);
    progressed += found - step;
    step = found;
  }
  EXPECT_GE(progressed, kRounds / 2);
  CheckpointWriter cleaned(root_, {});
  for (const auto& name : names()) EXPECT_TRUE(name.starts_with("step-")) << name;
}

TEST(State, RoundTripsAndNamesWhatIsMissing) {
  TrainState state;
  state.step = 7, state.seed = 9000000000000000, state.tokens_seen = 5, state.data_cursor = R"({"epoch":1,"q":"\""})",
  state.best_measure = 0.1, state.best_step = 6;
  state.seconds = 1.5;
  state.environment = {{"threads", "2"}, {"processor", "x"}};
  const auto back = state_from_json(to_json(state));
  EXPECT_EQ(back.data_cursor, state.data_cursor);
  EXPECT_EQ(back.seed, state.seed);
  EXPECT_EQ(back.best_measure, 0.1);
  EXPECT_EQ(back.environment, state.environment);
  EXPECT_EQ(to_json(back), to_json(state));
  try {
    state_from_json(R"({"step": 1})");
    FAIL();
  } catch (const UserError& e) { EXPECT_NE(std::string(e.what()).find("seed"), std::string::npos) << e.what(); }
  EXPECT_THROW(state_from_json("{"), UserError);
}

TEST(State, EnvironmentDifferences) {
  EXPECT_TRUE(environment_differences({{"threads", "2"}}, {{"threads", "2"}}).empty());
  EXPECT_EQ(environment_differences({{"threads", "2"}}, {{"threads", "4"}}),
            std::vector<std::string>{"threads was 2, is 4"});
  EXPECT_EQ(environment_differences({{"a", "1"}}, {{"b", "2"}}).size(), 2u);
}

}  // namespace
}  // namespace moegraft::checkpoint
