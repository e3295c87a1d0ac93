#pragma once
// Choices that several sections offer alike: sections do not include each other.

#include <span>

#include "moegraft/config/config.h"

namespace moegraft::config {

enum class Device { automatic, cpu, cuda };
inline constexpr Named<Device> kDevices[] = {{Device::automatic, "auto"}, {Device::cpu, "cpu"}, {Device::cuda, "cuda"}};
constexpr std::span<const Named<Device>> choices_of(Device) { return kDevices; }

// How documents become sequences.
enum class Packing { documents, stream };
inline constexpr Named<Packing> kPackings[] = {{Packing::documents, "documents"}, {Packing::stream, "stream"}};
constexpr std::span<const Named<Packing>> choices_of(Packing) { return kPackings; }

}  // namespace moegraft::config
