#include "groups.h"

#include "libtorch.h"

#include <numeric>

namespace moegraft::parallel {

std::shared_ptr<distributed::Communicator> split_world(const distributed::Mesh& mesh, const std::string& name) {
  std::vector<int64_t> all(size_t(mesh.world->size()));
  std::iota(all.begin(), all.end(), int64_t{0});
  return mesh.world->split(name, {all});
}

std::shared_ptr<distributed::Communicator> split_data(const distributed::Mesh& mesh, const std::string& name) {
  std::vector<std::vector<int64_t>> groups(size_t(mesh.expert_size()));
  for (int64_t rank = 0; rank < mesh.world->size(); ++rank) groups[size_t(rank % mesh.expert_size())].push_back(rank);
  return mesh.world->split(name, groups);
}

}  // namespace moegraft::parallel
