#pragma once
// What the writers of one checkpoint tell each other: a small shared dictionary, as distributed::World has it.

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "moegraft/distributed/world.h"

namespace moegraft::checkpoint {

struct Peers {
  int64_t rank = 0, size = 1;
  int64_t attempt = 0;  // how often the launcher has brought the run back: keys and temporary names of a dead attempt
                        // are never met again
  // Called from the writer's thread. post: visible to every rank soon; look: nothing yet, or what was posted.
  std::function<void(const std::string& key, const std::string& value)> post;
  std::function<std::optional<std::string>(const std::string& key)> look;
  std::chrono::milliseconds timeout{600'000};  // for the slowest rank to write its files
};

Peers peers_of(std::shared_ptr<distributed::World> world,
               std::chrono::milliseconds timeout = std::chrono::milliseconds{600'000});

}  // namespace moegraft::checkpoint
