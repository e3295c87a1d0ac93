#pragma once

#include <string>
#include <vector>

namespace moegraft::kernels {

// The library's process-wide switches, as this project wants them on a GPU: sums in float32 or exact, equal calls with
// equal bits. Once, before the first product on a device (graft::device_of does it); also in a build without CUDA,
// where nothing reads them.
void set_device_numerics();

// Which kernel this process wants for attention over packed sequences on a GPU: auto, flash, or cudnn (where it serves,
// else flash). Call before the first operation. UsageError, which begins with `whose` (the option or key): no name of a
// kernel.
void prefer_device_attention(const std::string& kernel, const std::string& whose);
std::vector<std::string> attention_choices();  // auto, flash, cudnn

// The kernel of attention on a GPU, and why that one. Empty in a build without CUDA.
std::string describe_device_attention();

}  // namespace moegraft::kernels
