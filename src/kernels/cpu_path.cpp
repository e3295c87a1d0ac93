#include "cpu_path.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <cstdlib>
#include <string>

#include "micro_kernel.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/cpu.h"

namespace moegraft::kernels {
namespace {

constexpr std::array<const char*, 5> kNames{"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Whether the CPU has AMX for bf16, and the kernel lets this process use it: tiles are state that a process must ask for.
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
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512cd");
  if (!has_avx2 || !avx2::kBf16Kernel.built()) return CpuPath::portable;
  if (!has_avx512 || !avx512::kBf16Kernel.built()) return CpuPath::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !avx512_bf16::kBf16Kernel.built()) return CpuPath::avx512;
  return amx::kBf16Kernel.built() && has_amx() ? CpuPath::amx : CpuPath::avx512_bf16;
}
#else
CpuPath find_best() { return CpuPath::portable; }
#endif

CpuPath choose() {
  const char* asked = std::getenv("MOEGRAFT_CPU_PATH");
  if (!asked || !*asked) return best_cpu_path();
  std::string known;
  for (size_t i = 0; i < kNames.size(); ++i) {
    known += (i ? ", " : "") + std::string(kNames[i]);
    if (std::string(asked) != kNames[i]) continue;
    MOEGRAFT_CHECK_USAGE(CpuPath(i) <= best_cpu_path(), "MOEGRAFT_CPU_PATH=", asked, ": this CPU (or build) has no such path; its best one is ", name_of(best_cpu_path()),
                         ". Leave the variable out to take that");
    return CpuPath(i);
  }
  throw UsageError("MOEGRAFT_CPU_PATH must be one of " + known + ", got \"" + asked + "\"");
}

}  // namespace

CpuPath best_cpu_path() {
  static const CpuPath best = find_best();
  return best;
}
CpuPath cpu_path() {
  static const CpuPath chosen = choose();
  return chosen;
}
const char* name_of(CpuPath path) { return kNames[size_t(path)]; }

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
  static const Choice<bf16> kBestFirst[]{
      {CpuPath::amx, amx::kBf16Kernel}, {CpuPath::avx512_bf16, avx512_bf16::kBf16Kernel}, {CpuPath::avx512, avx512::kBf16Kernel}, {CpuPath::avx2, avx2::kBf16Kernel}};
  static const MicroKernel<bf16>* const kernel = first_of(kBestFirst);
  return kernel;
}

CpuKernels cpu_kernels() {
  const auto* for_float = micro_kernel<float>();
  const auto* for_bf16 = micro_kernel<bf16>();
  const char* library = "library products (ATen)";
  return {name_of(cpu_path()), name_of(best_cpu_path()), for_float ? for_float->name : library, for_bf16 ? for_bf16->name : library, for_bf16 ? for_bf16->times_float : 0.0};
}

}  // namespace moegraft::kernels
