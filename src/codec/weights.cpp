#include "weights.h"

#include <set>

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"

namespace moegraft::codec {

io::TensorMap read_weights(const std::filesystem::path& dir) {
  const auto single = dir / "model.safetensors", index = dir / "model.safetensors.index.json";
  if (std::filesystem::exists(single)) return io::load_safetensors(single);
  MOEGRAFT_CHECK(std::filesystem::exists(index), "no weights in ", dir.string(),
                 ": expected model.safetensors or model.safetensors.index.json");
  const io::Json json = io::read_json(index);
  MOEGRAFT_CHECK(json.contains("weight_map") && json["weight_map"].is_object(), index.string(),
                 ": \"weight_map\" is missing or no object");
  std::set<std::string> files;
  for (const auto& [name, file] : json["weight_map"].items()) {
    MOEGRAFT_CHECK(file.is_string(), index.string(), ": weight_map[\"", name, "\"] must be a file name");
    MOEGRAFT_CHECK(std::filesystem::path(file.get<std::string>()).filename() == file.get<std::string>(), index.string(),
                   ": '", file.get<std::string>(), "' must be a file beside the index");
    files.insert(file.get<std::string>());
  }
  io::TensorMap all;
  for (const auto& file : files) all.merge(io::load_safetensors(dir / file));
  return all;
}

at::Tensor take_weight(const io::TensorMap& tensors, const std::string& name, const std::vector<int64_t>& shape,
                       const std::string& source) {
  const auto found = tensors.find(name);
  MOEGRAFT_CHECK(found != tensors.end(), source, ": tensor ", name, " is missing");
  MOEGRAFT_CHECK(found->second.sizes() == at::IntArrayRef(shape), source, ": ", name, " must have shape ", shape,
                 " by the config, got ", found->second.sizes().vec());
  MOEGRAFT_CHECK(at::isFloatingType(found->second.scalar_type()), source, ": ", name, " must hold floats, got ",
                 toString(found->second.scalar_type()));
  return found->second.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace moegraft::codec
