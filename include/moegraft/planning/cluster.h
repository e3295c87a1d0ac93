#pragma once
// A training step's time on more processes than there are here, from what was measured on a few.

#include <string>
#include <vector>

#include "moegraft/io/json.h"
#include "moegraft/planning/traffic.h"

namespace moegraft::planning {

struct ClusterLayout {
  int64_t nodes = 1, gpus = 1;  // gpus: processes of a node
  int64_t expert = 1;
  bool shard_base = false, shard_optimizer = false;
  int64_t processes() const { return nodes * gpus; }
};
// Outputs of `moegraft bench collectives --json` and `moegraft bench step --json` (one process), in any number and
// order; or a file of tools/bench_scaling.sh, which holds such outputs in a list "measured".
class Measurements {
 public:
  // UserError: a file that is none of these; no step or no collectives of several processes at all.
  explicit Measurements(const std::vector<std::string>& files);

  // What a process does by itself: seconds for so many tokens. Linear between the measured sizes, in proportion beyond
  // them.
  double compute_seconds(double tokens) const;
  // One call in a group of `members`, that spans nodes or not: the measured times of the group of the nearest size, its
  // latency scaled by the number of rounds and the rest by the bytes that pass each link.
  double seconds(Collective collective, double bytes, int64_t members, bool between_nodes) const;
  bool measured_between_nodes() const;
  const io::Json& step() const { return steps_.front(); }  // of the most tokens

 private:
  std::vector<io::Json> steps_, collectives_;
};

struct ClusterTimes {
  double compute = 0;                                                       // with what is computed twice
  double gradients = 0, experts = 0, base = 0, updates = 0, agreement = 0;  // seconds under way
  double exposed = 0;                                                       // of those, what no computing hides
  double step() const { return compute + exposed; }
};
// request: of one process under the layout. overlap: exchanges that run beside the computing hide behind it (GPUs); on
// CPUs they take the same cores.
ClusterTimes predict(const Measurements& measured, const MemoryRequest& request, const std::vector<Message>& traffic,
                     const ClusterLayout& layout, int64_t micro_batches, bool overlap);

}  // namespace moegraft::planning
