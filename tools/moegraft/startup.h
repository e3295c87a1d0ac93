#pragma once
// Process-wide settings that must be made before anything else runs.

#include <malloc.h>
#include <unistd.h>

#include <cstdlib>

namespace moegraft::tools {

// OpenMP threads that spin while they wait take the cores from every other job on the machine (seen: 20 times slower beside one compiler). libgomp
// reads its policy when it is loaded, before main(), so the process starts itself once more with the setting. An explicit setting is respected.
inline void choose_wait_policy(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  setenv("OMP_WAIT_POLICY", "PASSIVE", 1);
  execv("/proc/self/exe", argv);  // returns only when it fails: then go on as we are
}

// Large tensors come and go every step. By default glibc returns their pages to the kernel and faults them in again (seen: 10-20 % of a step).
inline void keep_pages() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that glibc takes
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
}

}  // namespace moegraft::tools
