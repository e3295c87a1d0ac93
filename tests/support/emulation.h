#pragma once
// The switch of the device emulated on the host (emulated_device.h), for test files beside the one that defines it.

#include <cstdint>

namespace moegraft::kernels {

inline bool emulated = false;  // while a test says so, CPU tensors count as the device's
inline int64_t emulated_layers = 0;  // layers of experts that went this way

struct Emulation {
  Emulation() { emulated = true; }
  ~Emulation() { emulated = false; }
};

}  // namespace moegraft::kernels
