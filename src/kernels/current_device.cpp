#include "moegraft/kernels/current_device.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace moegraft::kernels {

void make_current(c10::Device device) {
  if (!device.is_cpu() && device.has_index()) c10::impl::VirtualGuardImpl(device.type()).setDevice(device);
}

c10::Device current_device(c10::DeviceType kind) {
  return c10::impl::hasDeviceGuardImpl(kind) ? c10::impl::VirtualGuardImpl(kind).getDevice() : c10::Device(kind);
}

}  // namespace moegraft::kernels
