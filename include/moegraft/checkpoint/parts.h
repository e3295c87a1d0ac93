#pragma once
// What a process writes of a checkpoint: whole tensors, and row slices of those that are spread over processes. A
// checkpoint does not remember the layout of the run that wrote it: load() gives whole tensors back.

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moegraft/distributed/world.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/registry.h"

namespace moegraft::checkpoint {

// Which other ranks hold an equal copy, any of which may write it.
enum class Copies { everywhere, data_group, nowhere };

struct Part {
  std::string name;
  at::Tensor tensor;
  int64_t first_row = 0,
          total_rows = 0;  // as in model::Parameter: total_rows 0 is the whole tensor, else a slice along dimension 0
  Copies copies = Copies::everywhere;
};
using Parts = std::vector<Part>;

Parts whole(const io::TensorMap& tensors);

// Everything the registry holds here (views): replicated parameters, and slices that the data group has copies of.
Parts parameter_parts(const model::ParameterRegistry& registry);

// Where this process stands among those that hold copies.
struct Place {
  int64_t world_rank = 0, world_size = 1, data_rank = 0, data_size = 1;
};
Place place_in(const distributed::Mesh& mesh);

// The share of this process: every part of the run is in exactly one rank's share, the bytes are spread evenly. The
// ranks of a group must call it with equal lists of what they hold copies of (names, sizes, order); parts without
// copies stay here.
Parts parts_to_write(const Parts& held, const Place& place);

}  // namespace moegraft::checkpoint
