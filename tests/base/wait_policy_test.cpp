#include "moegraft/base/wait_policy.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <thread>
#include <vector>

namespace moegraft {
namespace {

TEST(WaitPolicy, ALongWaitForACoreIsSharingAndAShortOneIsNot) {
  const double ms = 1e6;
  EXPECT_FALSE(shares_cores(40 * ms, 0, false));
  EXPECT_FALSE(shares_cores(40 * ms, 2 * ms, false));
  EXPECT_TRUE(shares_cores(20 * ms, 20 * ms, false));
  EXPECT_TRUE(shares_cores(39 * ms, 2 * ms, true));  // once it is shared, a little waiting means that it still is
  EXPECT_FALSE(shares_cores(40 * ms, 0.5 * ms, true));
  EXPECT_FALSE(shares_cores(0, 0.5 * ms, false));  // a thread that slept and waited an instant for its core
}

int64_t threads_of_this_process() {
  int64_t count = 0;
  for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task")) ++count;
  return count;
}

TEST(WaitPolicy, KeepsMoreThreadsThanCoresWhileCoresAreShared) {
  if (!std::filesystem::exists("/proc/self/schedstat"))
    GTEST_SKIP() << "this kernel does not tell how long threads wait for a core";
  std::atomic<bool> busy{true};
  std::vector<std::thread> others;
  for (unsigned i = 0; i < 3 * std::thread::hardware_concurrency(); ++i)
    others.emplace_back([&] {
      while (busy) {}
    });
  const int64_t before = threads_of_this_process();
  const auto reaches = [&](const auto& condition) {
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < std::chrono::seconds(60))
      if (condition()) return true;
    return false;
  };
  {
    const WaitPolicy policy;
    EXPECT_TRUE(reaches([&] { return threads_of_this_process() >= before + 3; }));  // the watch, a team of at least two
    busy = false;
    for (auto& t : others) t.join();
    others.clear();
    const int64_t watching = before - 3 * int64_t(std::thread::hardware_concurrency()) + 1;
    EXPECT_TRUE(reaches([&] { return threads_of_this_process() <= watching; }));
  }
}

}  // namespace
}  // namespace moegraft
