#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>

#include <filesystem>

#include "moegraft/io/safetensors.h"

bool tensor_round_trip(const std::filesystem::path& dir) {
  const at::Tensor values = at::arange(12, at::kFloat).view({3, 4});
  moegraft::io::save_safetensors(dir / "values.safetensors", {{"values", values}});
  return at::equal(moegraft::io::load_safetensors(dir / "values.safetensors").at("values"), values);
}
