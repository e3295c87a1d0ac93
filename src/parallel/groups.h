#pragma once
// Process groups of a mesh beside those it comes with: what runs during the backward pass needs groups of its own, for
// its place among other collectives differs from rank to rank.

#include <memory>
#include <string>

#include "moegraft/distributed/world.h"

namespace moegraft::parallel {

// Everybody; and those that hold the same experts. Collective.
std::shared_ptr<distributed::Communicator> split_world(const distributed::Mesh& mesh, const std::string& name);
std::shared_ptr<distributed::Communicator> split_data(const distributed::Mesh& mesh, const std::string& name);

}  // namespace moegraft::parallel
