// Two processes save step after step; one of them dies by SIGKILL at a random instant, and the launcher then ends the
// other, as it does with a run.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/io/files.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

// In memory where that can be: many small files, each flushed to disk, take long on a busy one.
fs::path scratch() { return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : fs::temp_directory_path(); }

// A dictionary that lives on disk, so that it survives whoever dies.
Peers peers_on_disk(const fs::path& board, int64_t rank, int64_t attempt) {
  const auto file = [board](std::string key) {
    std::replace(key.begin(), key.end(), '/', '_');
    return board / key;
  };
  return {rank,
          2,
          attempt,
          [file](const std::string& key, const std::string& value) { io::write_file_atomic(file(key), value); },
          [file](const std::string& key) {
            return fs::exists(file(key)) ? std::optional(io::read_file(file(key))) : std::nullopt;
          },
          std::chrono::milliseconds(60'000)};
}

at::Tensor experts(int64_t step) { return at::arange(64, at::kFloat).reshape({4, 16}) + double(step); }

[[noreturn]] void keep_saving(const fs::path& root, const fs::path& board, int64_t rank, int64_t attempt, int64_t step,
                              int report) {
  try {
    CheckpointWriter writer(root, {.every = 1, .keep = 2, .keep_best = true}, true,
                            peers_on_disk(board, rank, attempt));
    writer.set_aside_after(step);
    for (int64_t s = step + 1;; ++s) {
      writer.save(s, {{"experts", experts(s).narrow(0, 2 * rank, 2), 2 * rank, 4}},
                  {{"moments." + std::to_string(rank), at::full({3}, double(s))}}, std::to_string(s),
                  double((s * 7919) % 101));
      const int64_t done = s - 1;
      if (rank == 0 && write(report, &done, sizeof done) != sizeof done) _exit(3);
    }
  } catch (const std::exception& e) {
    fprintf(stderr, "rank %d: %s\n", int(rank), e.what());
    _exit(2);
  }
}

TEST(Kill, EitherOfTwoProcessesAtAnyMoment) {
  constexpr int kRounds = 40;
  const fs::path folder = scratch() / ("moegraft_kill_" + std::to_string(getpid())), root = folder / "checkpoints",
                 board = folder / "board";
  fs::remove_all(folder);
  fs::create_directories(board);
  Rng rng(11, "kill");
  int64_t step = 0, progressed = 0;
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE(round);
    int report[2];
    ASSERT_EQ(pipe(report), 0);
    pid_t children[2];
    for (int rank = 0; rank < 2; ++rank) {
      children[rank] = fork();
      ASSERT_GE(children[rank], 0);
      if (children[rank] == 0) keep_saving(root, board, rank, round, step, report[1]);
    }
    close(report[1]);
    int64_t done = step;
    // Every other round may die in its first save; the others after two, however slow the machine.
    for (int i = 0; i < 2 * (round % 2); ++i) ASSERT_EQ(read(report[0], &done, sizeof done), ssize_t(sizeof done));
    std::this_thread::sleep_for(std::chrono::microseconds(rng.below(40000)));
    const int victim = int(rng.below(2));
    kill(children[victim], SIGKILL);
    std::this_thread::sleep_for(std::chrono::microseconds(rng.below(20000)));
    kill(children[1 - victim], SIGKILL);
    for (const pid_t child : children) {
      int status = 0;
      waitpid(child, &status, 0);
      EXPECT_TRUE(WIFSIGNALED(status)) << "a child failed by itself: " << status;
    }
    for (int64_t s; read(report[0], &s, sizeof s) == sizeof s;) done = s;
    close(report[0]);

    for (const auto& dir : list_checkpoints(root)) EXPECT_EQ(find_damage(dir), "") << dir;
    const auto latest = find_latest(root);
    ASSERT_EQ(latest.has_value(), latest || done > 0);
    if (!latest) continue;
    const auto loaded = load(*latest);
    EXPECT_GE(loaded.step, done);
    EXPECT_LE(loaded.step, done + 1);
    EXPECT_EQ(loaded.state, std::to_string(loaded.step));
    EXPECT_TRUE(at::equal(loaded.parameters.at("experts"), experts(loaded.step)));
    for (const char* name : {"moments.0", "moments.1"})
      EXPECT_TRUE(at::equal(loaded.optimizer.at(name), at::full({3}, double(loaded.step)))) << name;
    progressed += loaded.step - step;
    step = loaded.step;
  }
  EXPECT_GE(progressed, kRounds / 2);
  CheckpointWriter cleaned(root, {});
  for (const auto& entry : fs::directory_iterator(root))
    EXPECT_TRUE(entry.path().filename().string().starts_with("step-")) << entry.path();
  fs::remove_all(folder);
}

}  // namespace
}  // namespace moegraft::checkpoint
