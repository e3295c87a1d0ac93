#include "cpu_path.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "micro_kernel.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/kernels/cpu.h"

namespace moegraft::kernels {
namespace {

constexpr std::array<const char*, 5> kNames{"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Whether the CPU has AMX for bf16, and the kernel lets this process use it: tiles are state that a process must ask
// for.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return (d & kBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuPath find_best() {
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512cd");
  if (!has_avx2 || !avx2::kBf16Kernel.built()) return CpuPath::portable;
  if (!has_avx512 || !avx512::kBf16Kernel.built()) return CpuPath::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !avx512_bf16::kBf16Kernel.built()) return CpuPath::avx512;
  return amx::kBf16Kernel.built() && has_amx() ? CpuPath::amx : CpuPath::avx512_bf16;
}
#else
CpuPath find_best() { return CpuPath::portable; }
#endif

// What allow_cpu_path said, and whether cpu_path has been asked since.
std::atomic<int> allowed{-1};  // -1: nothing was said
std::atomic<bool> in_use{false};

}  // namespace

CpuPath best_cpu_path() {
  static const CpuPath best = find_best();
  return best;
}
CpuPath cpu_path() {
  static const CpuPath chosen = [] {
    in_use = true;
    const int path = allowed;
    return path < 0 ? best_cpu_path() : CpuPath(path);
  }();
  return chosen;
}
const char* name_of(CpuPath path) { return kNames[size_t(path)]; }

std::vector<std::string> cpu_path_choices() {
  std::vector<std::string> names{"auto"};
  names.insert(names.end(), kNames.begin(), kNames.end());
  return names;
}

void allow_cpu_path(const std::string& path, const std::string& whose) {
  const auto names = cpu_path_choices();
  const auto named = std::find(names.begin(), names.end(), path);
  MOEGRAFT_CHECK_USAGE(named != names.end(), whose, " must be one of ", join(names, ", "), ", got \"", path, "\"");
  const CpuPath asked = path == "auto" ? best_cpu_path() : CpuPath(named - names.begin() - 1);
  MOEGRAFT_CHECK_USAGE(asked <= best_cpu_path(), whose, " ", path,
                       ": this CPU (or build) has no such path; its best one is ", name_of(best_cpu_path()),
                       ", which auto takes");
  MOEGRAFT_INVARIANT(!in_use || asked == cpu_path(), whose, " ", path, ": ", name_of(cpu_path()), " is in use already");
  allowed = int(asked);
}

namespace {

// The first whose instructions are allowed.
template <class T>
struct Choice {
  CpuPath needs;
  const MicroKernel<T>& kernel;
};
template <class T, size_t N>
const MicroKernel<T>* first_of(const Choice<T> (&best_first)[N]) {
  for (const auto& choice : best_first)
    if (choice.needs <= cpu_path()) return &choice.kernel;
  return nullptr;
}

}  // namespace

template <>
const MicroKernel<float>* micro_kernel<float>() {
  static const Choice<float> kBestFirst[]{{CpuPath::avx512, avx512::kFloatKernel}, {CpuPath::avx2, avx2::kFloatKernel}};
  static const MicroKernel<float>* const kernel = first_of(kBestFirst);
  return kernel;
}
template <>
const MicroKernel<bf16>* micro_kernel<bf16>() {
  static const Choice<bf16> kBestFirst[]{{CpuPath::amx, amx::kBf16Kernel},
                                         {CpuPath::avx512_bf16, avx512_bf16::kBf16Kernel},
                                         {CpuPath::avx512, avx512::kBf16Kernel},
                                         {CpuPath::avx2, avx2::kBf16Kernel}};
  static const MicroKernel<bf16>* const kernel = first_of(kBestFirst);
  return kernel;
}

CpuKernels cpu_kernels() {
  const auto* for_float = micro_kernel<float>();
  const auto* for_bf16 = micro_kernel<bf16>();
  const char* library = "library products (ATen)";
  return {name_of(cpu_path()), name_of(best_cpu_path()), for_float ? for_float->name : library,
          for_bf16 ? for_bf16->name : library, for_bf16 ? for_bf16->times_float : 0.0};
}

}  // namespace moegraft::kernels
