#pragma once
// What multiplies on this CPU, for whoever reads a command's output.

#include <nlohmann/json.hpp>

#include "moegraft/kernels/cpu.h"

namespace moegraft::tools {

inline nlohmann::json describe_cpu() {
  const auto k = kernels::cpu_kernels();
  return {{"path", k.path}, {"best_path", k.best_path}, {"float32", k.float32}, {"bfloat16", k.bfloat16}};
}

}  // namespace moegraft::tools
