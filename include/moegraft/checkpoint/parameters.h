#pragma once
// Between the registry (or any set of named tensors) and the tensor maps of a checkpoint.

#include <set>
#include <string>

#include "moegraft/io/safetensors.h"
#include "moegraft/model/registry.h"

namespace moegraft::checkpoint {

io::TensorMap parameter_tensors(const model::ParameterRegistry& registry);  // by name, as they are here (views)
// Copies whole tensors, or this rank's rows of them, into the registry. UserError names what is missing, left over or
// misshapen.
void load_parameters(model::ParameterRegistry& registry, const io::TensorMap& tensors);

// Copies from[name] into `to`; with total_rows, rows [first_row, first_row + to.size(0)) of it. UserError: missing,
// another shape or dtype.
void restore_tensor(const at::Tensor& to, const io::TensorMap& from, const std::string& name, int64_t first_row = 0,
                    int64_t total_rows = 0);
// UserError names a tensor that is not among `known`.
void check_nothing_left(const io::TensorMap& tensors, const std::set<std::string>& known);

}  // namespace moegraft::checkpoint
