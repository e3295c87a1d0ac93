#include "moegraft/checkpoint/peers.h"

namespace moegraft::checkpoint {

Peers peers_of(std::shared_ptr<distributed::World> world, std::chrono::milliseconds timeout) {
  if (!world) return {};
  return {world->rank(),
          world->size(),
          world->environment().restart,
          [world](const std::string& key, const std::string& value) { world->post(key, value); },
          [world](const std::string& key) { return world->look(key); },
          timeout};
}

}  // namespace moegraft::checkpoint
