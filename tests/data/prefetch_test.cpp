#include "moegraft/data/prefetch.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <semaphore>
#include <thread>

#include "moegraft/base/check.h"
#include "stream_fixture.h"

namespace moegraft::data {
namespace {

using test::Longs;
using test::values;

// Batches that hold their own number; what happens around them is the test's.
struct Watched {
  std::atomic<int> made{0};
  std::atomic<bool> busy{false}, died_busy{false};
  std::atomic<std::thread::id> thread{};
  std::counting_semaphore<> gate{0};
  bool gated = false;
};

class NumberFeed : public BatchFeed {
 public:
  NumberFeed(Watched& watched, int64_t throws_at) : watched_(watched), throws_at_(throws_at) {}
  ~NumberFeed() override { watched_.died_busy = watched_.busy.load(); }
  StepBatch next() override {
    watched_.busy = true;
    watched_.thread = std::this_thread::get_id();
    if (watched_.gated) watched_.gate.acquire();
    watched_.busy = false;
    if (number_ % 3 == 2) warn_("batch " + std::to_string(number_));
    if (number_ == throws_at_) fail("batch ", number_, " cannot be made");
    ++watched_.made;
    model::PackedBatch batch;
    batch.ids_T = at::full({1}, number_++, at::kLong);
    StepBatch step;
    step.micro_batches.push_back(batch);
    return step;
  }
  std::string state() const override { return std::to_string(number_); }
  void restore(const std::string& state) override {
    MOEGRAFT_CHECK(state != "bad", "not a cursor");
    number_ = std::stoll(state);
    throws_at_ = -1;
  }
  StreamCounts counts() const override { return {number_, 0, 0}; }
  double epochs() const override { return double(number_) / 10; }
  void set_warn(Warn warn) override { warn_ = std::move(warn); }

 private:
  Watched& watched_;
  int64_t number_ = 0, throws_at_;
  Warn warn_;
};

PrefetchStream numbers(Watched& watched, int64_t depth, int64_t throws_at = -1) {
  return {std::make_unique<NumberFeed>(watched, throws_at), depth};
}
int64_t number(const StepBatch& step) { return values(step.micro_batches[0].ids_T)[0]; }
// False instead of a hang when it never comes true.
bool comes_true(const std::function<bool()>& done) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!done() && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
  return done();
}
std::string error_of(PrefetchStream& stream) {
  try {
    stream.next();
  } catch (const UserError& e) { return e.what(); }
  return "";
}

struct Prefetch : test::StreamData {
  PrefetchStream prefetched(int64_t depth) {
    return {std::make_unique<BatchStream>(config.train, config, test::vocabulary(), 17), depth};
  }
};

TEST_F(Prefetch, GivesTheBatchesOfThePlainStream) {
  config.caption_dropout = 0.5;
  for (const Packing packing : {Packing::documents, Packing::stream})
    for (const int64_t depth : {0, 1, 4}) {
      config.packing = packing;
      auto plain = stream();
      auto ahead = prefetched(depth);
      EXPECT_EQ(ahead.state(), plain.state());
      while (plain.epochs() < 4) {
        expect_equal(whole(ahead.next()), whole(plain.next()));
        EXPECT_EQ(ahead.state(), plain.state());
        EXPECT_EQ(ahead.epochs(), plain.epochs());
        EXPECT_EQ(ahead.counts().documents, plain.counts().documents);
      }
    }
}

TEST_F(Prefetch, ACursorTakenAnywhereGoesOnInAFreshStream) {
  config.caption_dropout = 0.5;
  for (const Packing packing : {Packing::documents, Packing::stream}) {
    config.packing = packing;
    auto plain = stream();
    auto ahead = prefetched(3);
    for (int b = 0; b < 25; ++b) {
      const std::string state = ahead.state();
      auto resumed = prefetched(b % 3);
      resumed.restore(state);
      const auto expected = whole(plain.next());
      expect_equal(whole(resumed.next()), expected);
      expect_equal(whole(ahead.next()), expected);
      auto resumed_plain = stream();
      resumed_plain.restore(state);
      expect_equal(whole(resumed_plain.next()), expected);
      for (int c = 0; c < 3; ++c) expect_equal(whole(resumed.next()), whole(resumed_plain.next()));
    }
    // And back, in a stream that has a full queue.
    auto reference = stream();
    ahead.restore(reference.state());
    for (int c = 0; c < 4; ++c) expect_equal(whole(ahead.next()), whole(reference.next()));
  }
}

// Whatever the thread has made ahead, the cursor is that of the last batch handed out.
TEST(PrefetchQueue, IsBoundedAndTheCursorStaysBehindIt) {
  Watched watched;
  auto stream = numbers(watched, 4);
  EXPECT_EQ(watched.made, 0) << "nothing runs before the first next(), so restore() may come first";
  stream.restore("5");
  EXPECT_EQ(stream.state(), "5");
  for (int64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(number(stream.next()), 5 + i);
    ASSERT_TRUE(comes_true([&] { return watched.made == i + 1 + 4; }));
    EXPECT_EQ(stream.state(), std::to_string(6 + i));
    EXPECT_EQ(stream.counts().documents, 6 + i);
    EXPECT_DOUBLE_EQ(stream.epochs(), double(6 + i) / 10);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(watched.made, 24);
  EXPECT_NE(watched.thread.load(), std::this_thread::get_id());
  stream.restore("2");
  EXPECT_EQ(stream.state(), "2");
  EXPECT_EQ(number(stream.next()), 2);
}

TEST(PrefetchQueue, DepthZeroWorksInTheCallersThread) {
  Watched watched;
  auto stream = numbers(watched, 0);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(number(stream.next()), i);
    EXPECT_EQ(watched.made, i + 1);
  }
  EXPECT_EQ(watched.thread.load(), std::this_thread::get_id());
  EXPECT_THROW(numbers(watched, -1), InvariantError);
}

TEST(PrefetchQueue, AnErrorComesInItsPlace) {
  for (const int64_t depth : {0, 1, 3}) {
    Watched watched;
    auto stream = numbers(watched, depth, 2);
    EXPECT_EQ(number(stream.next()), 0);
    if (depth == 3) {
      ASSERT_TRUE(comes_true([&] { return watched.made == 2; }));
    }
    EXPECT_EQ(number(stream.next()), 1);
    for (int again = 0; again < 2; ++again) {
      EXPECT_EQ(error_of(stream), "batch 2 cannot be made");
      EXPECT_EQ(stream.state(), "2");
    }
    stream.restore("1");
    EXPECT_EQ(number(stream.next()), 1);
    EXPECT_EQ(number(stream.next()), 2);
  }
}

TEST(PrefetchQueue, ABadCursorLeavesTheStreamWhereItWas) {
  for (const int64_t depth : {0, 3}) {
    Watched watched;
    auto stream = numbers(watched, depth);
    stream.next();
    EXPECT_THROW(stream.restore("bad"), UserError);
    EXPECT_EQ(stream.state(), "1");
    EXPECT_EQ(number(stream.next()), 1);
  }
}

TEST(PrefetchQueue, WarningsComeWithTheirBatchInTheCallersThread) {
  for (const int64_t depth : {0, 4}) {
    Watched watched;
    auto stream = numbers(watched, depth, 5);
    std::vector<std::string> heard;
    const auto caller = std::this_thread::get_id();
    stream.set_warn([&](const std::string& message) {
      EXPECT_EQ(std::this_thread::get_id(), caller);
      heard.push_back(message);
    });
    for (size_t i = 0; i < 5; ++i) {
      stream.next();
      EXPECT_EQ(heard.size(), i < 2 ? 0u : 1u) << "after batch " << i;
    }
    EXPECT_NE(error_of(stream), "");
    EXPECT_EQ(heard, (std::vector<std::string>{"batch 2", "batch 5"}));
  }
}

TEST(PrefetchQueue, EndsCleanlyUnusedFullFailedAndBusy) {
  Watched unused, full, failed, busy;
  { auto stream = numbers(unused, 2); }
  EXPECT_EQ(unused.made, 0);
  {
    auto stream = numbers(full, 2);
    stream.next();
    ASSERT_TRUE(comes_true([&] { return full.made == 3; }));
  }
  EXPECT_EQ(full.made, 3);
  {
    auto stream = numbers(failed, 2, 1);
    stream.next();
  }
  std::thread opens_the_gate;
  {
    busy.gated = true;
    busy.gate.release();
    auto stream = numbers(busy, 2);
    stream.next();
    EXPECT_TRUE(comes_true([&] { return busy.busy.load(); }));
    opens_the_gate = std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      busy.gate.release();
    });
  }
  opens_the_gate.join();
  EXPECT_EQ(busy.made, 2) << "the batch in the making was finished";
  EXPECT_FALSE(busy.died_busy) << "the feed must outlive the thread";
}

TEST(PrefetchQueue, SurvivesAMove) {
  Watched watched;
  auto stream = numbers(watched, 2);
  stream.next();
  PrefetchStream moved = std::move(stream);
  EXPECT_EQ(number(moved.next()), 1);
}

int64_t num_threads() { return std::distance(std::filesystem::directory_iterator("/proc/self/task"), {}); }

// A second OpenMP team would compete with the step's own for the cores.
TEST_F(Prefetch, OneThreadAndNoTeam) {
  config.tokens_per_step = 1 << 18;  // far above ATen's grain of 32768 elements
  const int64_t before = num_threads();
  auto ahead = prefetched(2);
  for (int b = 0; b < 4; ++b) ahead.next();
  EXPECT_EQ(num_threads(), before + 1);
}

}  // namespace
}  // namespace moegraft::data
