#include "moegraft/checkpoint/parameters.h"

#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::checkpoint {

void restore_tensor(const at::Tensor& to, const io::TensorMap& from, const std::string& name) {
  const auto found = from.find(name);
  MOEGRAFT_CHECK(found != from.end(), "the checkpoint has no tensor ", name, ": it belongs to a run with other adapters or modalities");
  MOEGRAFT_CHECK(found->second.sizes() == to.sizes(), "tensor ", name, " of the checkpoint must have the shape ", to.sizes().vec(), ", got ",
                 found->second.sizes().vec());
  MOEGRAFT_CHECK(found->second.scalar_type() == to.scalar_type(), "tensor ", name, " of the checkpoint must be ", c10::toString(to.scalar_type()), ", got ",
                 c10::toString(found->second.scalar_type()));
  at::Tensor target = to;
  target.copy_(found->second);
}

void check_nothing_left(const io::TensorMap& tensors, const std::set<std::string>& known) {
  for (const auto& [name, tensor] : tensors)
    MOEGRAFT_CHECK(known.contains(name), "the checkpoint has a tensor ", name, " that this run does not know: it belongs to a run with other adapters or modalities");
}

io::TensorMap parameter_tensors(const model::ParameterRegistry& registry) {
  io::TensorMap tensors;
  for (const auto& parameter : registry.all()) tensors[parameter.name] = parameter.tensor.detach();
  return tensors;
}

void load_parameters(model::ParameterRegistry& registry, const io::TensorMap& tensors) {
  at::NoGradGuard no_grad;
  std::set<std::string> known;
  for (const auto& parameter : registry.all()) known.insert(parameter.name);
  check_nothing_left(tensors, known);
  for (const auto& parameter : registry.all()) restore_tensor(parameter.tensor.detach(), tensors, parameter.name);
}

}  // namespace moegraft::checkpoint
