#include "loops.h"

namespace moegraft::kernels {
namespace {

bool has_avx512() {
#if defined(__x86_64__)
  static const bool yes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512cd");
  return yes;
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool yes = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return yes;
#else
  return false;
#endif
}

}  // namespace

template <>
const Loops<float>& loops<float>() {
  return has_avx512() ? v4::kFloatLoops : v3::kFloatLoops;
}
template <>
const Loops<bf16>& loops<bf16>() {
  return has_avx512_bf16() ? v4_bf16::kBf16Loops : has_avx512() ? v4::kBf16Loops : v3::kBf16Loops;
}

}  // namespace moegraft::kernels
