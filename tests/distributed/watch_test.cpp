// The watch over collectives on a GPU, with works that a test completes. What NCCL itself does needs a GPU:
// cuda_test.cpp.
#include <gtest/gtest.h>

#include <c10/core/impl/FakeGuardImpl.h>

#include <atomic>
#include <future>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "distributed/store_guard.h"
#include "distributed/watch.h"
#include "libtorch.h"
#include "moegraft/kernels/current_device.h"

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

// A kind of device that this program has eight of, each thread with a current one, as for CUDA.
using Fake = c10::impl::FakeGuardImpl<c10::DeviceType::PrivateUse1>;
C10_REGISTER_GUARD_IMPL(PrivateUse1, Fake);

struct AsksWhere : FakeWork {
  std::atomic<int> device = -1;
  bool isCompleted() override {
    device = kernels::current_device(c10::DeviceType::PrivateUse1).index();
    return FakeWork::isCompleted();
  }
};

TEST(Watch, AsksOnTheDeviceOfTheCollectives) {
  const auto look = [](c10::Device device) {
    auto work = c10::make_intrusive<AsksWhere>();
    Watch watch(200ms, {}, [](const std::string&) {}, device);
    watch.add(work, named("bucket"));
    while (work->device < 0) std::this_thread::sleep_for(2ms);
    return int(work->device);
  };
  EXPECT_EQ(look(c10::Device(c10::DeviceType::PrivateUse1, 3)), 3);
  EXPECT_EQ(look(at::kCPU), 0) << "where a new thread stands";
  EXPECT_EQ(kernels::current_device(c10::DeviceType::PrivateUse1).index(), 0) << "this thread's is its own";
}

TEST(CurrentDevice, IsTheThreadsOwn) {
  const c10::Device second(c10::DeviceType::PrivateUse1, 2);
  std::thread([&] {
    kernels::make_current(second);
    EXPECT_EQ(kernels::current_device(second.type()), second);
    kernels::make_current(at::kCPU);
    kernels::make_current(c10::Device(second.type()));  // whichever
    EXPECT_EQ(kernels::current_device(second.type()), second);
  }).join();
  EXPECT_EQ(kernels::current_device(second.type()).index(), 0);
  EXPECT_FALSE(kernels::current_device(c10::DeviceType::HPU).has_index()) << "there is none";
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

TEST(StoreGuard, ACallThatOutlivesItsLimitIsNamed) {
  std::promise<std::string> said;
  StoreGuard guard("rank 1: rank 0 (its store at 127.0.0.1:1)", [&](const std::string& line) { said.set_value(line); });
  { const StoreGuard::Call quick(guard, std::chrono::milliseconds(50)); }
  auto line = said.get_future();
  EXPECT_EQ(line.wait_for(std::chrono::milliseconds(600)), std::future_status::timeout) << "a call that ended in time";
  const StoreGuard::Call frozen(guard, std::chrono::milliseconds(50));
  ASSERT_EQ(line.wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_NE(line.get().find("rank 1: rank 0 (its store at 127.0.0.1:1) has not answered for 0.05 s"),
            std::string::npos);
}

TEST(StoppingStore, WaitingForAKeyEndsWithAnotherRanksTrouble) {
  const auto inner = c10::make_intrusive<c10d::HashStore>();
  std::atomic<bool> trouble{false};
  const auto store = stop_at_trouble(inner, [&] { return trouble.load(); });
  inner->set("there", std::vector<uint8_t>{1, 2});
  EXPECT_EQ(store->get("there"), (std::vector<uint8_t>{1, 2}));
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    trouble = true;
  });
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_THROW(store->wait({"never"}, std::chrono::minutes(10)), std::runtime_error);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  later.join();
  EXPECT_THROW(store->wait({"never"}, std::chrono::milliseconds(20)), std::runtime_error) << "its own timeout";
}

}  // namespace
}  // namespace moegraft::distributed
