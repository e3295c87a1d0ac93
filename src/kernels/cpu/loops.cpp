#include "loops.h"

#include "cpu_path.h"

namespace moegraft::kernels {
template <>
const Loops<float>& loops<float>() {
  static const Loops<float>& chosen = cpu_path() >= CpuPath::avx512 ? v4::kFloatLoops : v3::kFloatLoops;
  return chosen;
}
template <>
const Loops<bf16>& loops<bf16>() {
  static const Loops<bf16>& chosen = cpu_path() >= CpuPath::avx512_bf16 ? v4_bf16::kBf16Loops
                                     : cpu_path() >= CpuPath::avx512    ? v4::kBf16Loops
                                                                        : v3::kBf16Loops;
  return chosen;
}

}  // namespace moegraft::kernels
