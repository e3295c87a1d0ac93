#pragma once
// What the CPU paths of this process run on.

#include <string>

namespace moegraft::kernels {

struct CpuKernels {
  std::string path, best_path;    // in use, and the best that this machine has: portable, avx2, avx512, avx512_bf16, amx
  std::string float32, bfloat16;  // what multiplies in each dtype
  double bfloat16_speed = 0;      // its products a second beside float32's, roughly; 0: many times slower
};

// Chosen at first use from the CPU and the variable MOEGRAFT_CPU_PATH (one of the paths). Throws UserError where that names no path, or one that the machine
// has not.
CpuKernels cpu_kernels();

}  // namespace moegraft::kernels
