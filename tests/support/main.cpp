// The main() of test programs that run on every CPU path (cpu_path.h).
#include <gtest/gtest.h>

#include "cpu_path.h"

int main(int argc, char** argv) {
  moegraft::testing::take_cpu_path(argc, argv);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
