#pragma once
// Between the registry (or any set of named tensors) and the tensor maps of a checkpoint.

#include <set>
#include <string>

#include "moegraft/io/safetensors.h"
#include "moegraft/model/registry.h"

namespace moegraft::checkpoint {

// The registry's tensors by name, for a checkpoint (views), and back (copies; UserError names what is missing, left over or misshapen).
io::TensorMap parameter_tensors(const model::ParameterRegistry& registry);
void load_parameters(model::ParameterRegistry& registry, const io::TensorMap& tensors);

// Copies from[name] into `to`. UserError: missing, another shape or dtype.
void restore_tensor(const at::Tensor& to, const io::TensorMap& from, const std::string& name);
// UserError names a tensor that is not among `known`.
void check_nothing_left(const io::TensorMap& tensors, const std::set<std::string>& known);

}  // namespace moegraft::checkpoint
