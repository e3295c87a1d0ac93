#pragma once
// Experts that stay in host memory and visit the device a layer at a time: for bases larger than the device's memory.

#include <memory>
#include <vector>

#include "moegraft/model/expert_ring.h"

namespace moegraft::model {

// prefetch(l) starts a copy on a stream of its own; experts(l, ...) lets the current stream wait for it (the host never waits).
// On the CPU the copies happen at once: the same logic, for tests.
class OffloadedWeights : public ExpertRing {
 public:
  // rest: everything but the experts, on the device that computes. buffers >= 2.
  explicit OffloadedWeights(std::shared_ptr<WeightProvider> rest, int64_t buffers = kRingBuffers);
  ~OffloadedWeights() override;

  // In host memory. With a CUDA device they are copied into page-locked memory; otherwise kept as they are (mapped, say).
  void add_layer(const ExpertWeights& host) override;
  bool copies() const override { return device().is_cuda(); }

 protected:
  void fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) override;
  void await(int64_t slot) override;

 private:
  struct Lane;  // a buffer's stream
  std::vector<std::vector<at::Tensor>> layers_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace moegraft::model
