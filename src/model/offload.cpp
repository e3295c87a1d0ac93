#include "moegraft/model/offload.h"

#include "libtorch.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

// LibTorch's device-independent streams: no CUDA header, and the CPU has none of it.
c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }
c10::Stream another_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
}

}  // namespace

struct OffloadedWeights::Lane {
  explicit Lane(at::Device device) : copies(another_stream(device)), ready(device.type()) {}
  c10::Stream copies;
  c10::Event ready;
};

OffloadedWeights::OffloadedWeights(std::shared_ptr<WeightProvider> rest, std::optional<HostArena> arena,
                                   int64_t buffers)
    : ExpertRing(std::move(rest), buffers), arena_(std::move(arena)), lanes_(size_t(buffers)) {}
OffloadedWeights::~OffloadedWeights() = default;

void OffloadedWeights::add_layer(const ExpertWeights& host) {
  Layer layer{declare_layer(host), 0};
  for (const auto& t : layer.parts) {
    MOEGRAFT_INVARIANT(t.is_cpu(), "OffloadedWeights: an expert's matrix is on ", t.device().str());
    layer.numel += t.numel();
  }
  if (arena_) {
    std::vector<at::Tensor> kept = arena_->take(layer.numel, dtype());
    copy_end_to_end(layer.parts, kept);
    layer.parts = std::move(kept);
  }
  layers_.push_back(std::move(layer));
}

void OffloadedWeights::fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) {
  const auto& [parts, numel] = layers_[size_t(layer)];
  const at::Tensor to = buffer.narrow(0, 0, numel);
  if (!device().is_cuda()) return copy_end_to_end(parts, {to});
  auto& lane = lanes_[size_t(slot)];
  if (!lane) lane = std::make_unique<Lane>(device());
  // After whatever still reads the buffer (or, when it is new, its memory's last owner).
  c10::Event before(device().type());
  before.record(current_stream(device()));
  before.block(lane->copies);
  buffer.record_stream(lane->copies);
  const c10::StreamGuard guard(lane->copies);
  copy_end_to_end(parts, {to}, /*non_blocking=*/true);
  lane->ready.record(lane->copies);
}

void OffloadedWeights::await(int64_t slot) {
  if (const auto& lane = lanes_[size_t(slot)]) lane->ready.block(current_stream(device()));
}

}  // namespace moegraft::model
