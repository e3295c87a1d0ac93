#pragma once
// Which device a thread works on.

#include <c10/core/Device.h>

namespace moegraft::kernels {

// Makes `device` the calling thread's own; nothing on the CPU. What a thread of ours does first: a new thread stands on
// device 0, and even to ask an event makes a context there, half a gigabyte of a GPU that belongs to another process.
void make_current(c10::Device device);

// The calling thread's device of a kind; one without a number where the program has none of that kind.
c10::Device current_device(c10::DeviceType kind);

}  // namespace moegraft::kernels
