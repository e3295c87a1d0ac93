#pragma once
// Switches of the emulated device (emulated_device.h, which one file of the test program includes).

#include <cstdint>
#include <vector>

#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

inline bool emulated = false;                         // while a test says so, CPU tensors count as the device's
inline int64_t emulated_layers = 0;                   // layers of experts that went this way
inline bool emulated_attention = false;               // attention too, over packed sequences only
inline std::vector<DeviceLengths> attention_lengths;  // what each of its calls was given, forwards and backwards

struct Emulation {
  Emulation() { emulated = true; }
  ~Emulation() { emulated = emulated_attention = false; }
  Emulation(const Emulation&) = delete;
  Emulation& operator=(const Emulation&) = delete;
};

}  // namespace moegraft::kernels
