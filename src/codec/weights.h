#pragma once
// Reading a codec's weights with every shape checked.

#include <filesystem>
#include <string>
#include <vector>

#include "moegraft/io/safetensors.h"

namespace moegraft::codec {

// dir/model.safetensors, or the shards that dir/model.safetensors.index.json lists. UserError names what is missing.
io::TensorMap read_weights(const std::filesystem::path& dir);

// tensors[name] as float32, own memory. UserError: absent (from source), or another shape.
at::Tensor take_weight(const io::TensorMap& tensors, const std::string& name, const std::vector<int64_t>& shape,
                       const std::string& source);

}  // namespace moegraft::codec
