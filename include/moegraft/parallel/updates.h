#pragma once
// Who updates which parameter, when the optimizer's state is split over the processes that hold the parameter.

#include <memory>
#include <vector>

#include "moegraft/distributed/world.h"
#include "moegraft/model/registry.h"

namespace moegraft::parallel {

// Every parameter has one owner in the group that replicates it (the world; for expert parameters the data group),
// chosen from the registry and the mesh alone: the largest first, each to the rank that owns least so far. The owner
// keeps its optimizer state, updates it and hands the new value round.
class UpdateSharding {
 public:
  static constexpr int64_t kTogether =
      int64_t{4} << 20;  // elements: what is smaller travels in a common buffer of about this size

  // The registry is complete, outlives this and is equal on all ranks.
  UpdateSharding(const model::ParameterRegistry& registry, distributed::Mesh mesh);

  // Per parameter, in the registry's order: whether this process owns it (as train::AdamW wants it).
  std::vector<bool> owned() const;
  // Per parameter, in the registry's order: rank in the group that replicates it.
  const std::vector<int64_t>& owners() const { return owners_; }

  // Collective, after the owners' updates: the new values of all parameters that have a gradient (on every rank alike:
  // GradientReducer sees to it) reach the other members.
  void share() const;

 private:
  const model::ParameterRegistry& registry_;
  distributed::Mesh mesh_;
  std::vector<int64_t> owners_, mine_;
};

}  // namespace moegraft::parallel
