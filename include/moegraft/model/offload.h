#pragma once
// Experts that stay in host memory and visit the device a layer at a time: for bases larger than the device's memory.

#include <memory>
#include <optional>
#include <vector>

#include "moegraft/model/expert_ring.h"
#include "moegraft/model/host_arena.h"

namespace moegraft::model {

// prefetch(l) starts a copy on a stream of its own; experts(l, ...) lets the current stream wait for it (the host never
// waits). On the CPU the copies happen at once: the same logic, for tests.
class OffloadedWeights : public ExpertRing {
 public:
  // rest: everything but the experts, on the device that computes. arena: memory that layers are copied into,
  // page-locked for a GPU: a few large copies from there run beside the computation, many small ones from mapped memory
  // do not. None: layers stay as they are given. buffers >= 2.
  explicit OffloadedWeights(std::shared_ptr<WeightProvider> rest, std::optional<HostArena> arena = {},
                            int64_t buffers = kRingBuffers);
  ~OffloadedWeights() override;

  void add_layer(const ExpertWeights& host) override;  // in host memory
  bool copies() const override { return arena_.has_value(); }

 protected:
  void fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) override;
  void await(int64_t slot) override;

 private:
  struct Lane;  // a buffer's stream
  struct Layer {
    std::vector<at::Tensor> parts;  // laid end to end: the layer as a buffer holds it
    int64_t numel = 0;
  };
  std::optional<HostArena> arena_;
  std::vector<Layer> layers_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace moegraft::model
