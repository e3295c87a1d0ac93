#include "moegraft/kernels/device_numerics.h"

#include <ATen/Context.h>
#include <gtest/gtest.h>

#include "libtorch.h"

namespace moegraft::kernels {
namespace {

// The switches are the process's: what they are to be is set wrong first, as an environment or another library may
// have.
TEST(DeviceNumerics, SumsAreInFloat32AndEqualCallsGiveEqualBits) {
  at::Context& library = at::globalContext();
  library.setAllowBF16ReductionCuBLAS(true);
  library.setAllowTF32CuDNN(true);
  library.setAllowTF32CuBLAS(true);
  library.setBenchmarkCuDNN(true);
  library.setDeterministicCuDNN(false);
  set_device_numerics();
  EXPECT_NE(library.allowBF16ReductionCuBLAS(), at::CuBLASReductionOption::AllowReducedPrecisionWithSplitK);
  EXPECT_EQ(library.allowBF16ReductionCuBLAS(), at::CuBLASReductionOption::DisallowReducedPrecisionAllowSplitK);
  EXPECT_FALSE(library.allowTF32CuDNN());
  EXPECT_FALSE(library.allowTF32CuBLAS());
  EXPECT_EQ(library.float32MatmulPrecision(), at::Float32MatmulPrecision::HIGHEST);
  EXPECT_FALSE(library.benchmarkCuDNN());
  EXPECT_TRUE(library.deterministicCuDNN());
}

}  // namespace
}  // namespace moegraft::kernels
