// What a device has free, read through LibTorch's device-independent allocator.
#include "moegraft/model/device.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <gtest/gtest.h>

#include <cstring>

#include "libtorch.h"

namespace moegraft::model {
namespace {

// A device with 3 GB free of 7, under the type that LibTorch keeps for other people's hardware.
class Card : public c10::DeviceAllocator {
 public:
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {size_t(3'000'000'000) + size_t(device), size_t(7'000'000'000)};
  }
  c10::DataPtr allocate(size_t) override { return {}; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

TEST(FreeMemory, IsTheAllocatorsAnswerForThatDevice) {
  EXPECT_FALSE(free_memory(at::kCPU).has_value());
  EXPECT_EQ(free_memory(at::kCUDA).has_value(), torch::cuda::is_available());
  EXPECT_FALSE(free_memory(at::Device(at::kPrivateUse1, 2)).has_value()) << "nobody registered it";
  Card card;
  c10::SetAllocator(at::kPrivateUse1, &card);
  EXPECT_EQ(free_memory(at::Device(at::kPrivateUse1, 2)), 3'000'000'002);
  c10::SetAllocator(at::kPrivateUse1, nullptr);
}

}  // namespace
}  // namespace moegraft::model
