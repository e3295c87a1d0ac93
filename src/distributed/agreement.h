#pragma once

#include "moegraft/distributed/world.h"
#include "shared.h"

namespace moegraft::distributed {

// World::agree. `number`: how many agreements came before.
void reach_agreement(const Shared& shared, int64_t number, const std::vector<World::Fact>& facts,
                     const std::optional<std::string>& error);

}  // namespace moegraft::distributed
