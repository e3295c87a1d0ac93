#pragma once
// The `routing` section of a run.

#include "moegraft/config/config.h"

namespace moegraft::routing {

struct RoutingConfig {
  int64_t every = 20;
  std::string router = "frozen";
  template <class V>
  void visit_fields(V& v) {
    v("every", every, config::range(1, 1e12), "Optimizer steps between lines of routing.jsonl.");
    v("router", router, config::one_of({"frozen"}), "What of the router trains.");
  }
};

}  // namespace moegraft::routing
