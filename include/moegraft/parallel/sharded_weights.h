#pragma once
// A frozen base whose experts are split over the processes that hold the same ones.

#include <memory>
#include <vector>

#include "moegraft/distributed/world.h"
#include "moegraft/model/expert_ring.h"

namespace moegraft::parallel {

// Each member of the data group keeps one equal part of every layer's experts. prefetch(l) starts to gather a layer
// into a ring of buffers, experts(l, ...) waits for it; on CUDA the host waits for nothing. Weights never change, so
// there is no traffic of gradients. prefetch() and experts() are collective: all members call them in the same order
// (ForwardOptions::lockstep).
class ShardedWeights : public model::ExpertRing {
 public:
  // rest: everything but the experts. buffers >= 2. Collective: makes a group of its own, for gathers run beside other
  // collectives.
  ShardedWeights(std::shared_ptr<model::WeightProvider> rest, const distributed::Mesh& mesh,
                 int64_t buffers = model::kRingBuffers);
  ~ShardedWeights() override;

  // All experts of the layer that this process computes with (its range, with expert parallelism); copies its part of
  // them.
  void add_layer(const model::ExpertWeights& experts) override;
  bool copies() const override { return true; }

  int64_t resident_bytes() const;  // of the parts kept here
  distributed::Traffic take_traffic() { return group_->take_traffic(); }

 protected:
  void fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) override;
  void await(int64_t slot) override;

 private:
  std::shared_ptr<distributed::Communicator> group_;
  std::vector<at::Tensor> parts_;                // [ceil(n / size)] of layer l, flat; undefined for a dense layer
  std::vector<distributed::Pending> under_way_;  // per buffer
};

}  // namespace moegraft::parallel
