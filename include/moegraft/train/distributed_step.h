#pragma once
// One process's part of a step, and its exchanges with the others. Alone, everything here is a plain zero_grad, norm or
// nothing.

#include <array>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "moegraft/checkpoint/parts.h"
#include "moegraft/distributed/world.h"
#include "moegraft/model/registry.h"
#include "moegraft/parallel/config.h"
#include "moegraft/parallel/gradients.h"
#include "moegraft/parallel/narrow_gradients.h"
#include "moegraft/parallel/sharded_weights.h"
#include "moegraft/parallel/updates.h"

namespace moegraft::train {

// Owns the sums of gradients over processes, the gradients in two bytes of a process alone, and the sharing of updates:
// all hooked onto the registry's parameters. While it lives, the registry and which of its parameters train must not
// change.
class DistributedStep {
 public:
  // The registry is complete. Collective. gradients: the dtype that they are kept in, float32 or bfloat16.
  DistributedStep(const parallel::ParallelConfig& config, const distributed::Mesh& mesh,
                  model::ParameterRegistry& registry, at::ScalarType gradients = at::kFloat);

  int64_t rank() const { return mesh_.world->rank(); }
  int64_t size() const { return mesh_.world->size(); }
  bool alone() const { return !mesh_.distributed(); }
  // Whether forward and backward passes hold collectives (ForwardOptions::lockstep).
  bool lockstep() const { return lockstep_; }
  std::vector<bool> owned() const;  // for AdamW: empty when every process updates everything

  // One step, in this order.
  void begin_step();       // no gradients
  void last_backward();    // before the last micro-batch's
  void finish_backward();  // every gradient is the sum over all processes
  // modalities: the ids of those with a token in this step, in any process. In lockstep every process runs every term
  // on experts, and so has gradients (zeros) where one process alone would have none: of modalities without a token.
  // Those are dropped, for AdamW's moments must not move.
  void forget_absent(const std::set<int64_t>& modalities);
  at::Tensor queue_grad_squares() const;  // of what is on a device, before the host waits for it
  double grad_norm(
      const std::array<double, 2>& from_device);  // each parameter once; from_device: what queue_grad_squares came to
  double grad_norm();                             // both, with a wait of its own
  void share_updates();

  // Sums of a few numbers over all processes, in float64 on the host.
  std::vector<double> sum(const std::vector<double>& mine, const char* what);
  // Every process's numbers, by rank.
  std::vector<std::vector<double>> gather(const std::vector<double>& mine, const char* what);
  void sum_in_place(at::Tensor& tensor, const char* what);

  checkpoint::Parts parts_to_write(const checkpoint::Parts& held) const {
    return checkpoint::parts_to_write(held, checkpoint::place_in(mesh_));
  }
  // What this process handed to collectives and how long its host waited for them, since the last call, by purpose:
  // "gradients", "experts", "updates" (and agreements and sums, a few bytes), "base" where it is sharded (null: it is
  // not). Nothing when alone.
  std::map<std::string, distributed::Traffic> take_traffic(parallel::ShardedWeights* base);
  void heartbeat(int64_t step);  // a sign of life that the others name should this process hang

 private:
  distributed::Mesh mesh_;
  model::ParameterRegistry& registry_;
  bool lockstep_;
  std::optional<parallel::NarrowGradients> narrow_;   // alone
  std::optional<parallel::GradientReducer> reducer_;  // with others
  std::optional<parallel::UpdateSharding> updates_;
};

}  // namespace moegraft::train
