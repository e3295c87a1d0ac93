#pragma once
// The processes of a test of several.

#include <gtest/gtest.h>

#include <memory>

#include "moegraft/distributed/world.h"
#include "support/ranks/ranks.h"

namespace moegraft::testing {

inline std::shared_ptr<distributed::World> join() {
  at::set_num_threads(1);
  return distributed::World::join(distributed::read_launch_environment(), {.timeout = std::chrono::seconds(60)});
}

}  // namespace moegraft::testing
