#include "loops.h"

#include "cpu_path.h"

namespace moegraft::kernels {
template <>
const Loops<float>& loops<float>() {
  return cpu_path() >= CpuPath::avx512 ? v4::kFloatLoops : v3::kFloatLoops;
}
template <>
const Loops<bf16>& loops<bf16>() {
  return cpu_path() >= CpuPath::avx512_bf16 ? v4_bf16::kBf16Loops : cpu_path() >= CpuPath::avx512 ? v4::kBf16Loops : v3::kBf16Loops;
}

}  // namespace moegraft::kernels
