#include "moegraft/parallel/part.h"

#include "libtorch.h"

#include <tuple>

#include "moegraft/parallel/dispatcher.h"

namespace moegraft::parallel {

Part load_part(const std::filesystem::path& dir, model::LoadOptions options, const distributed::Mesh& mesh,
               bool shard_base) {
  Part part;
  options.progress = mesh.world->rank() == 0;
  part.dispatcher = make_dispatcher(mesh, shard_base);
  if (mesh.expert_size() > 1) part.experts = part.dispatcher->local_experts(model::read_spec(dir).num_experts);
  std::tie(options.first_expert, options.num_experts) = part.experts;
  if (shard_base && mesh.data_size() > 1)
    options.keep_experts = [&](std::shared_ptr<model::WeightProvider> rest) {
      return part.sharded = std::make_shared<ShardedWeights>(std::move(rest), mesh);
    };
  part.base = model::load_base(dir, options);
  return part;
}

bool lockstep(const distributed::Mesh& mesh, bool shard_base) {
  return mesh.expert_size() > 1 || (shard_base && mesh.data_size() > 1);
}

}  // namespace moegraft::parallel
