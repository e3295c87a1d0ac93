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
c10::Stream another_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device); }

void copy_parts(const std::vector<at::Tensor>& parts, const at::Tensor& buffer) {
  int64_t at_element = 0;
  for (const auto& t : parts) {
    buffer.narrow(0, at_element, t.numel()).copy_(t.reshape({-1}), /*non_blocking=*/true);
    at_element += t.numel();
  }
}

}  // namespace

struct OffloadedWeights::Lane {
  explicit Lane(at::Device device) : copies(another_stream(device)), ready(device.type()) {}
  c10::Stream copies;
  c10::Event ready;
};

OffloadedWeights::OffloadedWeights(std::shared_ptr<WeightProvider> rest, int64_t buffers) : ExpertRing(std::move(rest), buffers), lanes_(size_t(buffers)) {}
OffloadedWeights::~OffloadedWeights() = default;

void OffloadedWeights::add_layer(const ExpertWeights& host) {
  std::vector<at::Tensor> parts = declare_layer(host);
  int64_t numel = 0;
  for (const auto& t : parts) {
    MOEGRAFT_INVARIANT(t.is_cpu(), "OffloadedWeights: an expert's matrix is on ", t.device().str());
    numel += t.numel();
  }
  if (device().is_cuda() && numel > 0) {  // one copy from page-locked memory runs beside the computation, many from mapped memory do not
    const at::Tensor pinned = at::empty({numel}, at::TensorOptions(dtype()).pinned_memory(true));
    copy_parts(parts, pinned);
    parts = {pinned};
  }
  layers_.push_back(std::move(parts));
}

void OffloadedWeights::fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) {
  const auto& parts = layers_[size_t(layer)];
  if (!device().is_cuda()) return copy_parts(parts, buffer);
  auto& lane = lanes_[size_t(slot)];
  if (!lane) lane = std::make_unique<Lane>(device());
  // After whatever still reads the buffer (or, when it is new, its memory's last owner).
  c10::Event before(device().type());
  before.record(current_stream(device()));
  before.block(lane->copies);
  buffer.record_stream(lane->copies);
  const c10::StreamGuard guard(lane->copies);
  copy_parts(parts, buffer);
  lane->ready.record(lane->copies);
}

void OffloadedWeights::await(int64_t slot) {
  if (const auto& lane = lanes_[size_t(slot)]) lane->ready.block(current_stream(device()));
}

}  // namespace moegraft::model
