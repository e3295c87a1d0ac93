#pragma once

#include <string>

namespace moegraft::kernels {

// The library's process-wide switches, as this project wants them on a GPU: sums in float32 or exact, equal calls with equal bits. Once, before the first
// product on a device (graft::parse_device does it); also in a build without CUDA, where nothing reads them.
void set_device_numerics();

// The kernel of attention on a GPU, and why that one: MOEGRAFT_ATTENTION in the environment chooses (flash, cudnn). Empty in a build without CUDA. UsageError:
// the variable names no kernel.
std::string describe_device_attention();

}  // namespace moegraft::kernels
