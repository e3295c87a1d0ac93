#include "moegraft/checkpoint/parameters.h"

#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::checkpoint {

void restore_tensor(const at::Tensor& to, const io::TensorMap& from, const std::string& name, int64_t first_row,
                    int64_t total_rows) {
  const auto found = from.find(name);
  MOEGRAFT_CHECK(found != from.end(), "the checkpoint has no tensor ", name,
                 ": it belongs to a run with other adapters or modalities");
  auto shape = to.sizes().vec();
  if (total_rows > 0) shape.at(0) = total_rows;
  MOEGRAFT_CHECK(found->second.sizes() == shape, "tensor ", name, " of the checkpoint must have the shape ", shape,
                 ", got ", found->second.sizes().vec());
  MOEGRAFT_CHECK(found->second.scalar_type() == to.scalar_type(), "tensor ", name, " of the checkpoint must be ",
                 c10::toString(to.scalar_type()), ", got ", c10::toString(found->second.scalar_type()));
  at::Tensor target = to;
  target.copy_(total_rows > 0 ? found->second.narrow(0, first_row, to.size(0)) : found->second);
}

void check_nothing_left(const io::TensorMap& tensors, const std::set<std::string>& known) {
  for (const auto& [name, tensor] : tensors)
    MOEGRAFT_CHECK(known.contains(name), "the checkpoint has a tensor ", name,
                   " that this run does not know: it belongs to a run with other adapters or modalities");
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
  for (const auto& parameter : registry.all())
    restore_tensor(parameter.tensor.detach(), tensors, parameter.name, parameter.first_row, parameter.total_rows);
}

}  // namespace moegraft::checkpoint
