#pragma once
// What the CPU paths of this process run on.

#include <string>
#include <vector>

namespace moegraft::kernels {

struct CpuKernels {
  std::string path, best_path;  // in use, and the best that this machine has: portable, avx2, avx512, avx512_bf16, amx
  std::string float32, bfloat16;  // what multiplies in each dtype
  double bfloat16_speed = 0;      // its products a second beside float32's, roughly; 0: many times slower
};

// Chosen at first use: the best that this machine has, or what allow_cpu_path left of it.
CpuKernels cpu_kernels();

// Keeps this process to the instructions of `path` (auto: all) whatever else the CPU has: to compare paths, or to rule
// one out. Call before the first operation of this module; InvariantError when another path is in use already.
// UsageError, which begins with `whose` (the option or key): no name of a path, or one that the machine or the build
// has not.
void allow_cpu_path(const std::string& path, const std::string& whose);
std::vector<std::string> cpu_path_choices();  // auto, and the paths from the slowest on

}  // namespace moegraft::kernels
