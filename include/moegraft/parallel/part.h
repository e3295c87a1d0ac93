#pragma once
// A process's part of a base that several hold together.

#include <filesystem>
#include <memory>
#include <utility>

#include "moegraft/distributed/world.h"
#include "moegraft/model/dispatcher.h"
#include "moegraft/model/weights.h"
#include "moegraft/parallel/sharded_weights.h"

namespace moegraft::parallel {

// What a model::Decoder is made of here.
struct Part {
  model::BaseModel base;
  std::shared_ptr<model::TokenDispatcher> dispatcher;
  std::pair<int64_t, int64_t> experts{0, 0};  // those that are here: first and count; count 0: all
  std::shared_ptr<ShardedWeights> sharded{};  // base.weights where they are split over the data group; null otherwise
};

// Reads this process's experts of a Hugging Face directory and everything else. options: which experts, and who keeps
// them, follow from the mesh. shard_base: as in ParallelConfig. Collective. Errors are load_base's, and a UsageError
// when the expert group's size does not divide the number of experts.
Part load_part(const std::filesystem::path& dir, model::LoadOptions options, const distributed::Mesh& mesh,
               bool shard_base);

// Whether forward and backward passes on such a part hold collectives (ForwardOptions::lockstep).
bool lockstep(const distributed::Mesh& mesh, bool shard_base);

}  // namespace moegraft::parallel
