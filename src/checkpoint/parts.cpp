#include "moegraft/checkpoint/parts.h"

#include "libtorch.h"

#include <algorithm>
#include <numeric>

#include "moegraft/base/check.h"

namespace moegraft::checkpoint {

Parts whole(const io::TensorMap& tensors) {
  Parts parts;
  for (const auto& [name, tensor] : tensors) parts.push_back({name, tensor});
  return parts;
}

Parts parameter_parts(const model::ParameterRegistry& registry) {
  Parts parts;
  for (const auto& p : registry.all())
    parts.push_back({p.name, p.tensor.detach(), p.first_row, p.total_rows,
                     p.total_rows > 0 ? Copies::data_group : Copies::everywhere});
  return parts;
}

Place place_in(const distributed::Mesh& mesh) {
  return {mesh.world->rank(), mesh.world->size(), mesh.data->rank(), mesh.data->size()};
}

Parts parts_to_write(const Parts& held, const Place& place) {
  std::vector<bool> mine(held.size());
  for (size_t i = 0; i < held.size(); ++i) mine[i] = held[i].copies == Copies::nowhere;
  // The largest first, each to the rank with the fewest bytes so far: every rank comes to the same result alone.
  const auto deal = [&](Copies copies, int64_t rank, int64_t size) {
    std::vector<size_t> order;
    for (size_t i = 0; i < held.size(); ++i)
      if (held[i].copies == copies) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return held[a].tensor.nbytes() > held[b].tensor.nbytes(); });
    std::vector<uint64_t> bytes(size);
    for (const size_t i : order) {
      const auto least = std::min_element(bytes.begin(), bytes.end());
      mine[i] = least - bytes.begin() == rank;
      *least += held[i].tensor.nbytes();
    }
  };
  deal(Copies::everywhere, place.world_rank, place.world_size);
  deal(Copies::data_group, place.data_rank, place.data_size);
  Parts parts;
  for (size_t i = 0; i < held.size(); ++i)
    if (mine[i]) parts.push_back(held[i]);
  return parts;
}

}  // namespace moegraft::checkpoint
