// The 8-bit AdamW kernel against the CPU's blocks; what else there is about the launches as a whole.
#include "launch_case.h"

#include <array>
#include <filesystem>
#include <set>

#include "kernels/adamw8_blocks.h"

#include "kernels/cuda/adamw8.cu"

namespace moegraft::kernels {
namespace {

using cuda::Arrays;

adamw8::Arrays make_state(Arrays& a, int64_t numel) {
  const int64_t blocks = (numel + adamw8::kBlock - 1) / adamw8::kBlock;
  const auto codes = [&] { return a.fill<uint8_t>(numel, [&](int64_t) { return a.below(256); }); };
  const auto scales = [&] {
    return a.fill<float>(blocks, [&](int64_t b) { return b == 1 ? 0.0f : 1e-3f * float(1 + a.below(100)); });
  };  // a block of zeros
  float* parameter = a.random<float>(numel);
  float* grad = a.fill<float>(
      numel, [&](int64_t i) { return i % 7 == 0 ? 0.0f : std::ldexp(float(a.below(2000) - 1000), -int(a.below(30))); });
  if (numel > 300) grad[300] = NAN;
  uint8_t* exp_avg_codes = codes();
  float* exp_avg_scales = scales();
  uint8_t* root_codes = codes();
  return {parameter, grad, exp_avg_codes, exp_avg_scales, root_codes, scales(), numel};
}

TEST(CudaLaunch, Adamw8) {
  std::array<float, 256> signed_map, unsigned_map;
  for (int code = 0; code < 256; ++code)
    signed_map[size_t(code)] = adamw8::signed_value(code), unsigned_map[size_t(code)] = adamw8::unsigned_value(code);
  const adamw8::Factors factors{0.9f, 0.1f, 0.99f, 0.01f, 0.999f, 1e-2f, 1.7f, 1e-8f, 0.5f};
  // Part of a block, whole ones, more than the grid holds at once (8 blocks of 8 warps on the stand-in's one
  // processor), none.
  for (const int64_t numel : {1, 255, 256, 777, 8 * 8 * 256 + 1000}) {
    Arrays host, device;
    const adamw8::Arrays on_host = make_state(host, numel), on_device = make_state(device, numel);
    for (int step = 0; step < 2; ++step) {
      for (int64_t b = 0; b * adamw8::kBlock < numel; ++b)
        adamw8::step_block(factors, on_host, b, signed_map.data(), unsigned_map.data());
      adamw8::step_cuda(factors, on_device, 0);
    }
    device.expect_equal(host, std::to_string(numel) + " values");
  }
}

// Device code that nobody launches here would not be tested.
TEST(CudaLaunch, EveryFileOfDeviceCodeIsIncludedInOneOfTheseTests) {
  std::set<std::string> files;
  for (const auto& file : std::filesystem::recursive_directory_iterator(MOEGRAFT_SOURCE_DIR "/src"))
    if (file.path().extension() == ".cu") files.insert(file.path().filename().string());
  EXPECT_EQ(files, (std::set<std::string>{"adamw8.cu", "moe_kernels.cu", "norm_kernels.cu", "route_kernels.cu"}));
}

void do_nothing() {}

TEST(CudaLaunch, RefusedLaunchesThrow) {
  EXPECT_THROW(cuda::start_kernel(&do_nothing, 0, 32, nullptr), c10::Error);
  EXPECT_THROW(cuda::start_kernel(&do_nothing, 1, 2048, nullptr), c10::Error);
  EXPECT_THROW(cuda::start_kernel(&do_nothing, int64_t{1} << 31, 32, nullptr), c10::Error);
  cuda::start_kernel(&do_nothing, 2, 64, nullptr);
}

}  // namespace
}  // namespace moegraft::kernels
