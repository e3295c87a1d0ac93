#pragma once
// Which instructions the CPU paths may use: what this machine has, or what allow_cpu_path (moegraft/kernels/cpu.h) left
// of it.

namespace moegraft::kernels {

// Each includes the ones before it. portable: ATen's products, and loops of the instruction set that the whole program
// is built for.
enum class CpuPath { portable, avx2, avx512, avx512_bf16, amx };

CpuPath cpu_path();       // from the first call on the same
CpuPath best_cpu_path();  // of this machine, whatever is allowed
const char* name_of(CpuPath path);

}  // namespace moegraft::kernels
