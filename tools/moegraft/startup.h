#pragma once
// Process-wide settings that must be made before anything else runs.

#include <malloc.h>
#include <unistd.h>

#include <cstdlib>

namespace moegraft::tools {

// Settings that the runtime libraries read before main(), so the process starts itself once more with them. Explicit
// ones are respected. OpenMP threads that spin without end while they wait take the cores from every other job on the
// machine (seen: 20 times slower beside one compiler); threads that sleep at once pay a wake-up for each of a step's
// hundreds of short parallel regions. So they spin for 0.1-0.3 ms and then sleep; while cores are shared, less
// (base/wait_policy.h). Large pages for the heap (where the kernel grants them on request) save address translations.
// MKL's products may depend on where their operands lie in memory (seen on AMD: weights mapped from a file and the same
// ones copied gave other bits), unless it is told to be reproducible.
inline void choose_policies(char** argv) {
  bool changed = false;
  if (!std::getenv("OMP_WAIT_POLICY") && !std::getenv("GOMP_SPINCOUNT")) {
    setenv("OMP_WAIT_POLICY", "PASSIVE", 1);
    setenv("GOMP_SPINCOUNT", "5000", 1);
    changed = true;
  }
  if (!std::getenv("MKL_CBWR")) {
    setenv("MKL_CBWR", "AUTO", 1);
    changed = true;
  }
  if (!std::getenv("GLIBC_TUNABLES")) {
    setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", 1);
    changed = true;
  }
  // LibTorch's store logs a stack for every connection that ends; what it means is said in a line of our own.
  if (!std::getenv("TORCH_CPP_LOG_LEVEL")) {
    setenv("TORCH_CPP_LOG_LEVEL", "FATAL", 1);
    changed = true;
  }
  if (changed) execv("/proc/self/exe", argv);  // returns only when it fails: then go on as we are
}

// Large tensors come and go every step. By default glibc returns their pages to the kernel and faults them in again
// (seen: 10-20 % of a step).
inline void keep_pages() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that glibc takes
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
}

}  // namespace moegraft::tools
