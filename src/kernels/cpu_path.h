#pragma once
// Which instructions the CPU paths may use: what this machine has, or what MOEGRAFT_CPU_PATH allows of it.

namespace moegraft::kernels {

// Each includes the ones before it. portable: ATen's products, and loops of the instruction set that the whole program is built for.
enum class CpuPath { portable, avx2, avx512, avx512_bf16, amx };

// Throws UserError where MOEGRAFT_CPU_PATH names no path, or one that this machine or build has not.
CpuPath cpu_path();
CpuPath best_cpu_path();  // of this machine, whatever is allowed
const char* name_of(CpuPath path);  // as MOEGRAFT_CPU_PATH has it

}  // namespace moegraft::kernels
