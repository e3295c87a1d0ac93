// The watch over collectives on a GPU, with works that a test completes. What NCCL itself does needs a GPU: cuda_test.cpp.
#include <gtest/gtest.h>

#include "distributed/watch.h"
#include "libtorch.h"

namespace moegraft::distributed {
namespace {

using namespace std::chrono_literals;

struct FakeWork : c10d::Work {
  void complete(std::exception_ptr error = {}) { finish(error); }
};

struct Reports {
  std::mutex mutex;
  std::vector<std::string> lines;
  Watch::End end() {
    return [this](const std::string& line) {
      const std::lock_guard lock(mutex);
      lines.push_back(line);
    };
  }
  std::vector<std::string> wait(size_t count, std::chrono::milliseconds limit = 3s) {
    for (const auto deadline = std::chrono::steady_clock::now() + limit;; std::this_thread::sleep_for(2ms)) {
      const std::lock_guard lock(mutex);
      if (lines.size() >= count || std::chrono::steady_clock::now() > deadline) return lines;
    }
  }
};

Watch::Explain named(const std::string& name) {
  return [name](double, const std::string& cause) { return name + ": " + cause; };
}

TEST(Watch, ReportsWhatOutlivesTheTimeoutOnce) {
  Reports reports;
  Watch watch(200ms, {}, reports.end());
  auto good = c10::make_intrusive<FakeWork>(), stuck = c10::make_intrusive<FakeWork>();
  watch.add(good, named("good"));
  watch.add(stuck, named("stuck"));
  good->complete();
  EXPECT_EQ(reports.wait(1), std::vector<std::string>{"stuck: timed out"});
  EXPECT_EQ(reports.wait(2, 300ms).size(), 1u);
}

TEST(Watch, ReportsAFailureAtOnce) {
  Reports reports;
  Watch watch(60s, {}, reports.end());
  auto work = c10::make_intrusive<FakeWork>();
  watch.add(work, named("bucket"));
  work->complete(std::make_exception_ptr(std::runtime_error("remote closed\nstack …")));
  EXPECT_EQ(reports.wait(1), std::vector<std::string>{"bucket: remote closed"});
}

TEST(Watch, StopsSoonWhenAnotherRankHasFailed) {
  Reports reports;
  std::atomic<bool> trouble = false;
  Watch watch(10s, [&] { return trouble.load(); }, reports.end());
  watch.add(c10::make_intrusive<FakeWork>(), named("bucket"));
  EXPECT_TRUE(reports.wait(1, 200ms).empty());
  trouble = true;
  EXPECT_EQ(reports.wait(1, 8s), std::vector<std::string>{"bucket: stopped after another rank's trouble"});
}

TEST(Watch, EndsWhileCollectivesAreUnderWay) {
  Reports reports;
  {
    Watch watch(60s, {}, reports.end());
    watch.add(c10::make_intrusive<FakeWork>(), named("open"));
  }
  EXPECT_TRUE(reports.lines.empty());
}

}  // namespace
}  // namespace moegraft::distributed
