// Checkpoints of several processes: whatever layout wrote one, whole tensors come back, and whatever happens to a rank,
// earlier ones stay.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

// In memory where that can be: many small files, each flushed to disk, take long on a busy one.
fs::path scratch() { return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : fs::temp_directory_path(); }

using std::chrono::milliseconds;

// What distributed::World's store is to real ranks.
class Board {
 public:
  Peers peers(int64_t rank, int64_t size, milliseconds timeout = milliseconds{20'000}, int64_t attempt = 0) {
    return {rank,
            size,
            attempt,
            [this](const std::string& key, const std::string& value) { post(key, value); },
            [this](const std::string& key) { return look(key); },
            timeout};
  }
  void post(const std::string& key, const std::string& value) {
    const std::lock_guard lock(mutex_);
    values_[key] = value;
  }
  std::optional<std::string> look(const std::string& key) {
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(key);
    return found == values_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::string> values_;
};

constexpr int64_t kExperts = 4;
at::Tensor factor_EPD(int64_t step) {
  return at::arange(kExperts * 2 * 3, at::kFloat).reshape({kExperts, 2, 3}) + double(100 * step);
}
io::TensorMap expected_parameters(int64_t step) {
  return {{"experts.A", factor_EPD(step)},
          {"q.A", at::full({5, 4}, double(step))},
          {"q.B", at::full({4, 5}, -double(step))},
          {"rows.image", at::arange(8, at::kFloat) + double(step)}};
}
io::TensorMap expected_optimizer(int64_t step) {
  return {{"experts.A.codes", factor_EPD(step).to(at::kByte)},
          {"experts.A.scales", at::arange(kExperts * 2, at::kFloat) + double(step)},
          {"experts.A.step", at::full({}, double(step))},
          {"q.A.exp_avg", at::full({5, 4}, 0.5 * double(step))},
          {"steps", at::scalar_tensor(step, at::kLong)}};
}

struct Layout {
  int64_t data = 1, expert = 1;
  int64_t size() const { return data * expert; }
};

// What the rank holds: its experts' rows, and all of the rest.
Parts held(const io::TensorMap& tensors, const Layout& layout, int64_t rank) {
  const int64_t index = rank % layout.expert;
  Parts parts;
  for (const auto& [name, tensor] : tensors) {
    const bool expert = name.starts_with("experts"), sliced = expert && layout.expert > 1;
    if (sliced && tensor.dim() == 0) {
      if (index == 0) parts.push_back({name, tensor, 0, 0, Copies::data_group});
    } else if (sliced) {
      const int64_t rows = tensor.size(0) / layout.expert;
      parts.push_back({name, tensor.narrow(0, index * rows, rows), index * rows, tensor.size(0), Copies::data_group});
    } else {
      parts.push_back({name, tensor});
    }
  }
  return parts;
}
Parts share(const io::TensorMap& tensors, const Layout& layout, int64_t rank) {
  return parts_to_write(held(tensors, layout, rank), {rank, layout.size(), rank / layout.expert, layout.data});
}

void expect_equal(const io::TensorMap& actual, const io::TensorMap& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(actual.contains(name)) << name;
    EXPECT_TRUE(at::equal(actual.at(name), tensor)) << name;
    EXPECT_EQ(actual.at(name).scalar_type(), tensor.scalar_type()) << name;
  }
}
void expect_contents(const fs::path& dir, int64_t step) {
  const auto loaded = load(dir);
  EXPECT_EQ(loaded.step, step);
  EXPECT_EQ(loaded.state, "state of rank 0");
  expect_equal(loaded.parameters, expected_parameters(step));
  expect_equal(loaded.optimizer, expected_optimizer(step));
}

fs::path save(CheckpointWriter& writer, const Layout& layout, int64_t rank, int64_t step,
              std::optional<double> measure = {}) {
  return writer.save(step, share(expected_parameters(step), layout, rank),
                     share(expected_optimizer(step), layout, rank), "state of rank " + std::to_string(rank), measure);
}

// Runs every rank in a thread; gives the message of each one's error.
std::vector<std::string> in_ranks(int64_t size, const std::function<void(int64_t)>& body) {
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (const std::exception& e) { errors[rank] = e.what(); }
    });
  for (auto& thread : threads) thread.join();
  return errors;
}
void expect_no_errors(const std::vector<std::string>& errors) {
  for (const auto& error : errors) EXPECT_EQ(error, "");
}

class LayoutTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = scratch() / ("moegraft_layout_" + std::to_string(getpid()) +
                         testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(root_)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }
  fs::path write(const Layout& layout, int64_t step = 1, CheckpointConfig config = {}) {
    Board board;
    expect_no_errors(in_ranks(layout.size(), [&](int64_t rank) {
      CheckpointWriter writer(root_, config, true, board.peers(rank, layout.size()));
      save(writer, layout, rank, step);
      writer.wait();
    }));
    return root_ / step_name(step);
  }
  // Rewrites the manifest of `dir` with a valid checksum of its own.
  static void edit_manifest(const fs::path& dir, const std::function<void(io::Json&)>& edit) {
    auto manifest = io::read_json(dir / "manifest.json");
    manifest.erase("checksum");
    edit(manifest);
    manifest["checksum"] = io::checksum_hex(manifest.dump());
    io::write_json(dir / "manifest.json", manifest);
  }
  fs::path root_;
};

constexpr const char* kAdapter0 = "adapter-00000-of-00002.safetensors";
constexpr const char* kAdapter1 = "adapter-00001-of-00002.safetensors";

TEST_F(LayoutTest, EveryLayoutReadsBackWhole) {
  for (const Layout layout :
       {Layout{1, 1}, Layout{1, 2}, Layout{1, 4}, Layout{2, 1}, Layout{4, 1}, Layout{2, 2}, Layout{3, 2}, Layout{2, 4}})
    for (const bool async : {false, true}) {
      SCOPED_TRACE(testing::Message() << "data " << layout.data << ", expert " << layout.expert << ", async " << async);
      fs::remove_all(root_);
      const auto dir = write(layout, 7, {.async = async});
      EXPECT_EQ(find_damage(dir), "");
      EXPECT_EQ(find_latest(root_), dir);
      expect_contents(dir, 7);
      EXPECT_EQ(names(), std::vector<std::string>{"step-00000007"});
      const int64_t files = std::distance(fs::directory_iterator(dir), fs::directory_iterator());
      EXPECT_EQ(files, 2 * layout.size() + 2);
    }
}

TEST_F(LayoutTest, SharesAreEvenAndDisjoint) {
  const Layout layout{3, 2};
  io::TensorMap tensors;
  for (int i = 0; i < 50; ++i) tensors["t" + std::to_string(i)] = at::zeros({1 + (i * 37) % 11, 16});
  std::map<std::string, int> writers;
  int64_t least = INT64_MAX, most = 0;
  for (int64_t rank = 0; rank < layout.size(); ++rank) {
    int64_t bytes = 0;
    for (const auto& part : share(tensors, layout, rank)) ++writers[part.name], bytes += int64_t(part.tensor.nbytes());
    least = std::min(least, bytes), most = std::max(most, bytes);
  }
  EXPECT_EQ(writers.size(), tensors.size());
  for (const auto& [name, count] : writers) EXPECT_EQ(count, 1) << name;
  EXPECT_LE(most - least, 11 * 16 * 4);
  const Parts owned = parts_to_write({{"x", at::zeros(3), 0, 0, Copies::nowhere}}, {5, 6, 2, 3});
  EXPECT_EQ(owned.size(), 1u) << "nobody else has it";
}

TEST_F(LayoutTest, SliceFilesAreMappedWholeOnesAndReadByAnyLayout) {
  const auto dir = write({1, 2}, 3);
  const auto loaded = load(dir);
  for (const Layout layout : {Layout{1, 1}, Layout{1, 2}, Layout{1, 4}})
    for (int64_t rank = 0; rank < layout.size(); ++rank) {
      model::ParameterRegistry registry;
      for (const auto& part : held(expected_parameters(3), layout, rank)) {
        model::Parameter parameter{part.name, at::zeros_like(part.tensor).set_requires_grad(true), "lora"};
        parameter.first_row = part.first_row, parameter.total_rows = part.total_rows;
        registry.add(parameter);
      }
      load_parameters(registry, loaded.parameters);
      const auto parts = held(expected_parameters(3), layout, rank);
      const auto back = parameter_parts(registry);
      ASSERT_EQ(back.size(), parts.size());
      for (size_t i = 0; i < parts.size(); ++i) {
        EXPECT_TRUE(at::equal(back[i].tensor, parts[i].tensor)) << parts[i].name;
        EXPECT_EQ(back[i].first_row, parts[i].first_row);
        EXPECT_EQ(back[i].total_rows, parts[i].total_rows);
        EXPECT_EQ(back[i].copies, parts[i].copies);
      }
    }
}

TEST_F(LayoutTest, AMisshapenSliceIsRefused) {
  const at::Tensor to = at::zeros({2, 3});
  EXPECT_NO_THROW(restore_tensor(to, {{"x", at::ones({6, 3})}}, "x", 4, 6));
  EXPECT_THROW(restore_tensor(to, {{"x", at::ones({5, 3})}}, "x", 2, 6), UserError);
  EXPECT_THROW(restore_tensor(to, {{"x", at::ones({6, 4})}}, "x", 2, 6), UserError);
}

TEST_F(LayoutTest, SameBytesInTheBackgroundAndNot) {
  const auto read_all = [&](const fs::path& dir) {
    std::map<std::string, std::string> bytes;
    for (const auto& entry : fs::directory_iterator(dir)) bytes[entry.path().filename()] = io::read_file(entry.path());
    return bytes;
  };
  for (const Layout layout : {Layout{1, 1}, Layout{2, 2}}) {
    const auto in_background = read_all(write(layout, 5, {.async = true}));
    fs::remove_all(root_);
    EXPECT_EQ(in_background, read_all(write(layout, 5, {.async = false})));
    fs::remove_all(root_);
  }
}

TEST_F(LayoutTest, WhatIsSavedIsWhatWasThereAtTheCall) {
  CheckpointWriter writer(root_, {});
  const at::Tensor tensor = at::full({1 << 20}, 1.0);
  for (int64_t step = 1; step <= 3; ++step) {
    tensor.fill_(double(step));
    writer.save(step, {{"x", tensor}}, {}, "");
    tensor.fill_(-1.0);
  }
  EXPECT_GT(writer.last_stall_seconds(), 0);
  EXPECT_EQ(writer.last_bytes(), 4 << 20);
  EXPECT_EQ(writer.buffer_bytes(), 4 << 20) << "one buffer, used again";
  writer.wait();
  EXPECT_GT(writer.last_write_seconds(), 0);
  for (int64_t step = 1; step <= 3; ++step)
    EXPECT_TRUE(at::equal(load(root_ / step_name(step)).parameters.at("x"), at::full({1 << 20}, double(step))));
}

// Figures for the log; an assertion on time would fail on a busy machine.
TEST_F(LayoutTest, TheStallOfBothWays) {
  const Parts parts{{"x", at::zeros({16 << 20})}};
  for (const bool async : {false, true}) {
    CheckpointWriter writer(root_, {.async = async});
    for (int64_t step = 1; step <= 3; ++step) {
      writer.save(step, parts, {}, "");
      const double stall = writer.last_stall_seconds();
      writer.wait();
      EXPECT_GT(stall, 0);
      EXPECT_GT(writer.last_write_seconds(), 0);
      std::printf("checkpoint.async %d, save %lld: 64 MiB, stall %.1f ms, written after %.1f ms\n", int(async),
                  static_cast<long long>(step), stall * 1e3, writer.last_write_seconds() * 1e3);
    }
  }
}

TEST_F(LayoutTest, EveryFileAndTheManifestAreGuarded) {
  const Layout layout{2, 2};
  const auto files = [&] {
    std::vector<std::string> files;
    for (const auto& entry : fs::directory_iterator(write(layout, 2))) files.push_back(entry.path().filename());
    return files;
  }();
  ASSERT_EQ(files.size(), 10u);
  write(layout, 1);
  const fs::path whole = root_.string() + "_whole";
  fs::rename(root_, whole);
  for (const auto& file : files)
    for (const char* how : {"flip", "cut", "remove", "grow"}) {
      SCOPED_TRACE(file + ": " + how);
      fs::remove_all(root_);
      fs::copy(whole, root_, fs::copy_options::recursive);
      const auto dir = root_ / step_name(2), path = dir / file;
      auto bytes = io::read_file(path);
      if (how == std::string("flip")) bytes[bytes.size() / 2] ^= 1;
      if (how == std::string("cut")) bytes.resize(bytes.size() - 1);
      if (how == std::string("grow")) bytes += ' ';
      if (how == std::string("remove"))
        fs::remove(path);
      else
        io::write_file_atomic(path, bytes);
      // A blank after the manifest changes nothing it says.
      if (file == "manifest.json" && (how == std::string("grow") || how == std::string("cut"))) continue;
      EXPECT_NE(find_damage(dir).find(file), std::string::npos) << find_damage(dir);
      EXPECT_THROW(load(dir), UserError);
      testing::internal::CaptureStderr();
      EXPECT_EQ(find_latest(root_)->filename(), "step-00000001");
      testing::internal::GetCapturedStderr();
    }
  fs::remove_all(whole);
}

TEST_F(LayoutTest, MissingAndDoubleRowsAreDamage) {
  struct Case {
    const char* what;
    std::function<void(io::Json&)> edit;
    const char* message;
  };
  const auto slice = [](io::Json& manifest, const char* file) -> io::Json& {
    return manifest["files"][file]["slices"]["experts.A"];
  };
  const Case cases[] = {
      {"no second file", [](io::Json& m) { m["files"].erase(kAdapter1); }, "rows 2 to 3 of experts.A are in no file"},
      {"no first file", [](io::Json& m) { m["files"].erase(kAdapter0); }, "rows 0 to 1 of experts.A are in no file"},
      {"overlap", [&](io::Json& m) { slice(m, kAdapter1)["first"] = 1; },
       "rows 1 to 1 of experts.A are in adapter-00000-of-00002.safetensors and again in adapter-00001"},
      {"the same rows", [&](io::Json& m) { slice(m, kAdapter1)["first"] = 0; }, "rows 0 to 1 of experts.A are in"},
      {"outside", [&](io::Json& m) { slice(m, kAdapter1)["first"] = 3; }, "do not lie in its 4 rows"},
      {"far outside", [&](io::Json& m) { slice(m, kAdapter1)["first"] = INT64_MAX; }, "do not lie in its 4 rows"},
      {"negative", [&](io::Json& m) { slice(m, kAdapter1)["first"] = -1; }, "do not lie in its 4 rows"},
      {"other total", [&](io::Json& m) { slice(m, kAdapter1)["total"] = 5; },
       "has 4 rows in adapter-00000-of-00002.safetensors, but 5"},
      {"more in total", [&](io::Json& m) { slice(m, kAdapter0)["total"] = slice(m, kAdapter1)["total"] = 6; },
       "rows 4 to 5 of experts.A are in no file"},
      {"not a slice", [&](io::Json& m) { m["files"][kAdapter1].erase("slices"); }, "the whole tensor experts.A is in"},
      {"slice of nothing",
       [](io::Json& m) { m["files"][kAdapter0]["slices"]["experts.Z"] = {{"first", 0}, {"total", 4}}; },
       "has no tensor experts.Z"},
      {"path", [](io::Json& m) { m["files"]["../state.json"] = m["files"]["state.json"]; },
       "is not the name of a file beside it"},
      {"no state", [](io::Json& m) { m["files"].erase("state.json"); }, "it does not list state.json"},
      {"mistyped", [&](io::Json& m) { slice(m, kAdapter0)["first"] = "zero"; }, "does not read as a manifest"},
      {"version", [](io::Json& m) { m["version"] = 3; }, "version"},
  };
  for (const auto& test : cases) {
    SCOPED_TRACE(test.what);
    fs::remove_all(root_);
    const auto dir = write({1, 2}, 1);
    edit_manifest(dir, test.edit);
    EXPECT_NE(find_damage(dir).find(test.message), std::string::npos) << find_damage(dir);
    EXPECT_THROW(load(dir), UserError);
  }
}

TEST_F(LayoutTest, AWrongLayoutFailsWhenItIsWritten) {
  Board board;
  const auto errors = in_ranks(2, [&](int64_t rank) {
    CheckpointWriter writer(root_, {}, true, board.peers(rank, 2));
    writer.save(1, {{"x", at::zeros({2, 2}), 0, 4}}, {}, "");
    writer.wait();
  });
  for (const auto& error : errors) EXPECT_NE(error.find("rows 0 to 1 of x are in"), std::string::npos) << error;
  EXPECT_TRUE(names().empty());
}

TEST_F(LayoutTest, OnlyRankZeroRemoves) {
  const Layout layout{2, 1};
  Board board;
  fs::create_directories(root_ / ".writing-step-00000009-0-1");
  expect_no_errors(in_ranks(2, [&](int64_t rank) {
    // The other rank may come long before rank 0 has cleared up.
    if (rank == 0) std::this_thread::sleep_for(milliseconds(50));
    CheckpointWriter writer(root_, {.every = 1, .keep = 2, .keep_best = true}, true, board.peers(rank, 2));
    const double measures[] = {5, 3, 4, 6, 7};
    for (int64_t step = 1; step <= 5; ++step) save(writer, layout, rank, step, measures[step - 1]);
    writer.set_aside_after(4);
  }));
  EXPECT_EQ(names(), (std::vector<std::string>{"damaged-step-00000005", "step-00000002", "step-00000004"}));
  expect_contents(root_ / "step-00000002", 2);
}

TEST_F(LayoutTest, AStepCanBeSavedAgainByAnotherLayout) {
  write({1, 1}, 4);
  write({1, 2}, 4);
  expect_contents(root_ / step_name(4), 4);
  Board board;
  expect_no_errors(in_ranks(2, [&](int64_t rank) {
    CheckpointWriter writer(root_, {}, true, board.peers(rank, 2));
    for (int again = 0; again < 3; ++again) save(writer, {2, 1}, rank, 4);
    writer.wait();
  }));
  expect_contents(root_ / step_name(4), 4);
  write({1, 1}, 4);
  EXPECT_TRUE(fs::exists(root_ / step_name(4) / "adapter.safetensors"));
  EXPECT_FALSE(fs::exists(root_ / step_name(4) / kAdapter0));
}

TEST_F(LayoutTest, ARankThatDoesNotComeIsNamed) {
  write({1, 1}, 1);
  Board board;
  const Layout layout{4, 1};
  const auto errors = in_ranks(4, [&](int64_t rank) {
    CheckpointWriter writer(root_, {}, true, board.peers(rank, 4, milliseconds(200)));
    if (rank == 1 || rank == 3) return;
    save(writer, layout, rank, 2);
    writer.wait();
  });
  EXPECT_NE(errors[0].find("ranks 1, 3 did not finish writing within 0.2 s"), std::string::npos) << errors[0];
  EXPECT_NE(errors[2].find("rank"), std::string::npos) << errors[2];
  EXPECT_EQ(names(), std::vector<std::string>{"step-00000001"});
}

TEST_F(LayoutTest, AnErrorOfOneRankReachesAllAtTheNextCall) {
  const Layout layout{3, 1};
  Board board;
  std::vector<int> saved(3);
  const auto errors = in_ranks(3, [&](int64_t rank) {
    CheckpointWriter writer(root_, {}, true, board.peers(rank, 3));
    save(writer, layout, rank, 1);
    writer.wait();
    // Rank 2 gives something that cannot be written.
    Parts parts;
    if (rank == 2) parts.push_back({"x", at::Tensor(at::zeros({2}, at::kComplexDouble))});
    writer.save(2, parts, {}, "");
    ++saved[rank];
    save(writer, layout, rank, 3);
    ++saved[rank];
  });
  EXPECT_EQ(saved, (std::vector<int>{1, 1, 1})) << "the call that failed returned, the next one threw";
  for (int64_t rank = 0; rank < 3; ++rank) {
    EXPECT_NE(errors[rank].find("step-00000002"), std::string::npos) << errors[rank];
    EXPECT_NE(errors[rank].find("x"), std::string::npos) << errors[rank];
    EXPECT_EQ(errors[rank].find("rank 2: ") != std::string::npos, rank != 2) << errors[rank];
  }
  EXPECT_EQ(find_latest(root_)->filename(), "step-00000001");
}

// As when a full disk stops a write in the background: RLIMIT_FSIZE fails it in the middle of a file.
TEST_F(LayoutTest, AFullDiskSurfacesAtTheNextCall) {
  const auto previous = signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  CheckpointWriter writer(root_, {});
  const auto parts = whole(expected_parameters(1));
  writer.save(1, parts, {}, "");
  writer.wait();
  rlimit tight = before;
  tight.rlim_cur = 100;
  setrlimit(RLIMIT_FSIZE, &tight);
  EXPECT_NO_THROW(writer.save(2, parts, {}, ""));
  std::string message;
  try {
    writer.save(3, parts, {}, "");
  } catch (const UserError& e) { message = e.what(); }
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, previous);
  EXPECT_NE(message.find("step-00000002"), std::string::npos) << message;
  EXPECT_NE(message.find("File too large"), std::string::npos) << message;
  EXPECT_EQ(names(), std::vector<std::string>{"step-00000001"});
  writer.save(4, parts, {}, "");  // told once, and space again
  EXPECT_NO_THROW(writer.wait());
  EXPECT_EQ(find_latest(root_)->filename(), "step-00000004");
}

TEST_F(LayoutTest, AWriterThatGoesAwayLogsAndEnds) {
  Board board;
  testing::internal::CaptureStderr();
  const auto start = std::chrono::steady_clock::now();
  {
    CheckpointWriter writer(root_, {}, true, board.peers(0, 2, std::chrono::hours(1)));
    writer.save(1, {}, {}, "");
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::minutes(1))
      << "not the hour that a living run would wait";
  EXPECT_NE(testing::internal::GetCapturedStderr().find("rank 1 did not finish writing"), std::string::npos);
  EXPECT_TRUE(names().empty());
}

TEST_F(LayoutTest, AnUnsharedFolderIsNamed) {
  Board board;
  const auto elsewhere = root_ / "elsewhere";
  const auto errors = in_ranks(2, [&](int64_t rank) {
    CheckpointWriter writer(rank ? elsewhere : root_ / "here", {}, true, board.peers(rank, 2));
    save(writer, {2, 1}, rank, 1);
    writer.wait();
  });
  for (const auto& error : errors)
    EXPECT_NE(error.find("must lie on a file system that all machines share"), std::string::npos) << error;
}

}  // namespace
}  // namespace moegraft::checkpoint
