// What every rank says when one is missing, disagrees, fails, dies or hangs: one line, soon.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <regex>
#include <thread>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/distributed/world.h"
#include "support/ranks/ranks.h"

namespace moegraft::distributed {
namespace {

using moegraft::testing::ProcessResult;
using moegraft::testing::rank_argument;
using moegraft::testing::Ranks;
using Seconds = std::chrono::duration<double>;

std::shared_ptr<World> join(std::chrono::milliseconds timeout) {
  at::set_num_threads(1);
  return World::join(read_launch_environment(), {.timeout = timeout});
}

double now() { return Seconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The rank ended with code 1 and one line that the pattern describes as a whole.
void expect_line(const ProcessResult& result, const std::string& pattern) {
  EXPECT_EQ(result.code, 1) << "signal " << result.signal << '\n' << result.err;
  EXPECT_TRUE(std::regex_match(result.err, std::regex(pattern + "\n")))
      << "expected " << pattern << "\ngot " << result.err;
}

RANK_BODY(short_join) { join(std::chrono::milliseconds(1000)); }

TEST(Failures, MissingRanksAtTheRendezvousAreNamed) {
  const double begin = now();
  const auto results = Ranks("short_join", 4, "", {0, 2}).wait();
  EXPECT_LT(now() - begin, 10);
  expect_line(results[0], "rank 0: ranks 1, 3 of 4 did not come within 1 s");
  expect_line(results[1], "rank 2: ranks 1, 3 of 4 did not come within 1 s");
}

TEST(Failures, MissingFirstRankIsNamed) {
  const auto results = Ranks("short_join", 3, "", {1, 2}).wait();
  for (int i = 0; i < 2; ++i) {
    expect_line(results[static_cast<size_t>(i)],
                "rank " + std::to_string(i + 1) +
                    ": nobody answers at 127\\.0\\.0\\.1:\\d+ after 1 s: rank 0 should; check that it has started, "
                    "MASTER_ADDR and MASTER_PORT, and firewalls");
  }
}

RANK_BODY(join_later) {
  if (read_launch_environment().rank != 1) std::this_thread::sleep_for(std::chrono::milliseconds(400));
  auto world = join(std::chrono::seconds(20));
  world->all().barrier("start");
}
TEST(Failures, RanksMayComeLate) { moegraft::testing::run_ranks("join_later", 3); }

RANK_BODY(disagree) {
  auto world = join(std::chrono::seconds(20));
  world->agree({{"version", "1"}, {"config", "run:\n  seed: 1\n"}});
  const auto rank = world->rank();
  std::vector<World::Fact> facts = {
      {"version", "1"}, {"config", "run:\n  seed: 1\n  steps: " + std::to_string(rank == 2 ? 20 : 10) + "\n"}};
  if (rank_argument() == "extra" && rank == 3)
    facts = {{"version", "1"}, {"config", "run:\n  seed: 1\n  steps: 10\n"}, {"new", "7"}};
  if (rank_argument() == "extra" && rank == 2) facts[1].value = "run:\n  seed: 1\n  steps: 10\n";
  if (rank_argument() == "several") facts[0].value = std::to_string(std::max<int64_t>(rank, 1));
  world->agree(facts);
}

TEST(Failures, DisagreementNamesTheFactAndTheRanks) {
  Ranks one("disagree", 3), several("disagree", 4, "several");
  for (const auto& r : one.wait()) {
    expect_line(
        r,
        "config differs between ranks: rank 0 has 'steps: 10', rank 2 has 'steps: 20': start all ranks with the same");
  }
  Ranks extra("disagree", 4, "extra");
  for (const auto& r : several.wait()) {
    expect_line(r,
                "version differs between ranks: rank 0 has '1', ranks 2, 3 have others, the first '2': start all ranks "
                "with the same");
  }
  for (const auto& r : extra.wait()) {
    expect_line(
        r, "new differs between ranks: rank 3 has '7', rank 0 does not know it: start all ranks with the same binary");
  }
}

RANK_BODY(startup_errors) {
  const std::string mode = rank_argument();
  auto world = join(std::chrono::milliseconds(mode == "silent" ? 1500 : 20'000));
  const auto rank = world->rank();
  if (mode == "silent" && rank == 1) std::this_thread::sleep_for(std::chrono::seconds(4));
  if (mode == "silent" && rank == 1) fail<UserError>("slept too long");
  std::optional<std::string> error;
  if (mode == "one" && rank == 2) error = "models/base: no such folder";
  if (mode == "all") error = "train.steps must be at least 1, got 0";
  if (mode == "two" && rank > 0) error = "reason " + std::to_string(rank);
  world->agree({{"config", mode == "one" ? std::to_string(rank) : ""}}, error);
}

TEST(Failures, AnErrorBeforeTheFirstStepReachesEveryRank) {
  Ranks silent("startup_errors", 2, "silent"), one("startup_errors", 4, "one");
  for (const auto& r : one.wait()) expect_line(r, "rank 2: models/base: no such folder");
  Ranks all("startup_errors", 2, "all"), two("startup_errors", 3, "two");
  for (const auto& r : all.wait()) expect_line(r, "train\\.steps must be at least 1, got 0");
  for (const auto& r : two.wait()) expect_line(r, "rank 1: reason 1; rank 2: reason 2");
  expect_line(silent.wait()[0], "rank 0: agreement before the first step: rank 1 did not answer within 1\\.5 s");
}

// Steps 0 … 7 are fine; at step 8 rank 1 does what the argument says instead of its part.
RANK_BODY(trouble) {
  auto world = join(rank_argument() == "hang" ? std::chrono::milliseconds(1500) : std::chrono::milliseconds(60'000));
  world->all().barrier("start");
  for (int64_t step = 0;; ++step) {
    if (step == 8 && world->rank() == 1) {
      if (rank_argument() == "die") raise(SIGKILL);
      if (rank_argument() == "hang") std::this_thread::sleep_for(std::chrono::seconds(60));
      if (rank_argument() == "leave") return;
      if (rank_argument() == "throw") {
        world->announce_failure("out of memory at step 8");
        fail<UserError>("out of memory at step 8");
      }
    }
    world->beat(step);
    at::Tensor t = at::ones({1000}), other = at::ones({1000});
    auto first = world->all().all_reduce(t, "gradients, bucket 3");
    auto second = world->all().all_reduce(other, "gradients, bucket 4");  // still under way when the first fails
    first.wait();
    second.wait();
  }
}

const std::string kOperation =
    ": all_reduce of \"gradients, bucket 3\" in group world \\((ranks [-0-9, ]+)\\) failed after ";

TEST(Failures, ADeadRankIsNoticedAtOnce) {
  const double begin = now();
  const auto results = Ranks("trouble", 4, "die").wait();
  EXPECT_LT(now() - begin, 20);  // of a timeout of 60 s
  EXPECT_EQ(results[1].signal, SIGKILL);
  for (const int r : {0, 2, 3}) {
    expect_line(results[static_cast<size_t>(r)],
                "rank " + std::to_string(r) + kOperation +
                    "[0-9.]+ s: rank 1 did not take part \\(last seen at step 7, \\d s ago\\)"
                    "(; ranks? [0-9, ]+ waits? in it too)?.*");
  }
}

TEST(Failures, AHungRankEndsInATimeout) {
  const double begin = now();
  Ranks ranks("trouble", 2, "hang");
  while (ranks[0].running()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const double took = now() - begin;
  EXPECT_GT(took, 1.5);
  EXPECT_LT(took, 20);  // the timeout, a second to hear the others, two to answer them
  ranks[1].send(SIGKILL);
  expect_line(
      ranks.wait()[0],
      "rank 0" + kOperation +
          "[12]\\.\\d s: rank 1 did not take part \\(last seen at step 7, \\d s ago\\) \\(.*[Tt]ime.?.?out.*\\)");
}

TEST(Failures, AFailedRankIsQuoted) {
  const auto results = Ranks("trouble", 3, "throw").wait();
  expect_line(results[1], "out of memory at step 8");
  for (const int r : {0, 2}) {
    expect_line(results[static_cast<size_t>(r)],
                "rank " + std::to_string(r) + kOperation + "[0-9.]+ s: rank 1 failed with: out of memory at step 8.*");
  }
}

TEST(Failures, ARankThatHasLeftIsNamed) {
  const auto results = Ranks("trouble", 2, "leave").wait();
  EXPECT_EQ(results[1].code, 0);
  expect_line(results[0], "rank 0" + kOperation + "[0-9.]+ s: rank 1 has left the run.*");
}

RANK_BODY(wrong_sizes) {
  auto world = join(std::chrono::seconds(20));
  at::Tensor in = at::ones({3, 2}), out = at::ones({3, 2}), half = at::ones({3, 2}, at::kHalf);
  EXPECT_THROW(world->all().all_to_all(out, in, {2, 2}, {2, 1}, "rows"), InvariantError);
  EXPECT_THROW(world->all().all_to_all(out, in, {3}, {3}, "rows"), InvariantError);
  EXPECT_THROW(world->all().all_to_all(half, in, {2, 1}, {2, 1}, "rows"), InvariantError);
  EXPECT_THROW(world->all().all_gather(out, in, "rows"), InvariantError);
  EXPECT_THROW(world->all().broadcast(out, 2, "rows"), InvariantError);
  at::Tensor turned = at::ones({3, 2}).t();
  EXPECT_THROW(world->all().all_reduce(turned, "rows"), InvariantError);
  world->all().barrier("still in step");
}
TEST(Failures, WrongSizesAreOurBug) { moegraft::testing::run_ranks("wrong_sizes", 2); }

}  // namespace
}  // namespace moegraft::distributed
