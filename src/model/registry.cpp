#include "moegraft/model/registry.h"

#include "moegraft/base/check.h"

namespace moegraft::model {

void ParameterRegistry::add(Parameter parameter) {
  MOEGRAFT_INVARIANT(!parameter.name.empty(), "a parameter needs a name");
  MOEGRAFT_INVARIANT(parameter.tensor.defined() && parameter.tensor.scalar_type() == at::kFloat, "parameter ",
                     parameter.name, " must be a float32 tensor");
  MOEGRAFT_INVARIANT(parameter.tensor.is_leaf() && parameter.tensor.requires_grad(), "parameter ", parameter.name,
                     " must be a leaf that requires grad");
  MOEGRAFT_INVARIANT(parameter.tensor.is_contiguous(), "parameter ", parameter.name, " must be contiguous");
  for (const auto& other : parameters_) {
    MOEGRAFT_INVARIANT(other.name != parameter.name, "parameter ", parameter.name, " is registered twice");
    // A tied tensor under two names would be clipped and updated twice.
    MOEGRAFT_INVARIANT(!other.tensor.is_same(parameter.tensor), "parameters ", other.name, " and ", parameter.name,
                       " are one tensor");
  }
  parameters_.push_back(std::move(parameter));
}

const Parameter* ParameterRegistry::find(const std::string& name) const {
  for (const auto& parameter : parameters_)
    if (parameter.name == name) return &parameter;
  return nullptr;
}

int64_t ParameterRegistry::num_elements() const {
  int64_t count = 0;
  for (const auto& parameter : parameters_) count += parameter.tensor.numel();
  return count;
}

void ParameterRegistry::zero_grad() {
  for (auto& parameter : parameters_) parameter.tensor.mutable_grad().reset();
}

void ParameterRegistry::set_trainable(const std::string& pattern_prefix, bool trainable) {
  for (auto& parameter : parameters_) {
    if (parameter.name.compare(0, pattern_prefix.size(), pattern_prefix) != 0) continue;
    parameter.tensor.set_requires_grad(trainable);
    if (!trainable) parameter.tensor.mutable_grad().reset();
  }
}

}  // namespace moegraft::model
