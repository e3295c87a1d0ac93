#include "moegraft/model/offload.h"

#include "libtorch.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

// LibTorch's device-independent streams: no CUDA header, and the CPU has none of it.
c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }
c10::Stream another_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device); }

}  // namespace

struct OffloadedWeights::Slot {
  explicit Slot(at::Device device) {
    if (!device.is_cuda()) return;
    copies.emplace(another_stream(device));
    ready.emplace(device.type());
  }
  at::Tensor buffer;
  int64_t layer = -1;
  int64_t used = 0;      // when it was asked for last
  bool awaited = false;  // prefetched, not yet asked for
  std::optional<c10::Stream> copies;
  std::optional<c10::Event> ready;
};

OffloadedWeights::OffloadedWeights(std::shared_ptr<WeightProvider> rest, int64_t buffers) : rest_(std::move(rest)), ring_(size_t(buffers)) {
  MOEGRAFT_INVARIANT(rest_ && buffers >= 2, "OffloadedWeights: ", buffers, " buffers; one computes while another is filled");
}
OffloadedWeights::~OffloadedWeights() = default;

void OffloadedWeights::add_layer(const ExpertWeights& host) {
  Layer layer;
  layer.experts = host.count();
  if (layer.experts > 0) {
    layer.width = host.gate_FD.front().size(0);
    layer.depth = host.gate_FD.front().size(1);
    for (int64_t e = 0; e < layer.experts; ++e)
      for (const auto* list : {&host.gate_FD, &host.up_FD}) layer.parts.push_back((*list)[size_t(e)].detach());
    for (const auto& t : host.down_DF) layer.parts.push_back(t.detach());
    for (const auto& t : layer.parts)
      MOEGRAFT_INVARIANT(t.is_cpu() && t.scalar_type() == dtype() && t.numel() == layer.width * layer.depth, "OffloadedWeights: an expert's matrix ", t.sizes(), " ", c10::toString(t.scalar_type()));
  }
  if (device().is_cuda() && layer.experts > 0) {  // one copy from page-locked memory runs beside the computation, many from mapped memory do not
    const at::Tensor pinned = at::empty({layer.numel()}, at::TensorOptions(dtype()).pinned_memory(true));
    int64_t at_element = 0;
    for (const auto& t : layer.parts) {
      pinned.narrow(0, at_element, t.numel()).copy_(t.reshape({-1}));
      at_element += t.numel();
    }
    layer.parts = {pinned};
  }
  largest_ = std::max(largest_, layer.numel());
  layers_.push_back(std::move(layer));
}

OffloadedWeights::Slot* OffloadedWeights::find(int64_t layer) {
  for (auto& slot : ring_)
    if (slot && slot->layer == layer) return slot.get();
  return nullptr;
}

// An empty buffer, else the one whose layer was asked for longest ago; one that waits to be asked for only when all do.
OffloadedWeights::Slot& OffloadedWeights::choose() {
  for (auto& slot : ring_)
    if (!slot) return *(slot = std::make_unique<Slot>(device()));
  const auto least = std::min_element(ring_.begin(), ring_.end(), [](const auto& a, const auto& b) { return std::pair(a->awaited, a->used) < std::pair(b->awaited, b->used); });
  return **least;
}

void OffloadedWeights::fill(Slot& slot, int64_t layer) {
  const at::NoGradGuard no_grad;
  const bool held = slot.buffer.defined() && slot.buffer.storage().use_count() > 1;
  if (held) ++traffic_.replaced;
  if (held || !slot.buffer.defined() || slot.buffer.numel() < largest_) slot.buffer = at::empty({largest_}, at::TensorOptions(dtype()).device(device()));
  slot.layer = layer;
  slot.awaited = true;
  ++traffic_.copies;
  const auto copy = [&] {
    int64_t at_element = 0;
    for (const auto& t : layers_[size_t(layer)].parts) {
      slot.buffer.narrow(0, at_element, t.numel()).copy_(t.reshape({-1}), /*non_blocking=*/true);
      at_element += t.numel();
    }
  };
  if (!slot.copies) return copy();
  // After whatever still reads the buffer (or, when it is new, its memory's last owner).
  c10::Event before(device().type());
  before.record(current_stream(device()));
  before.block(*slot.copies);
  slot.buffer.record_stream(*slot.copies);
  const c10::StreamGuard guard(*slot.copies);
  copy();
  slot.ready->record(*slot.copies);
}

void OffloadedWeights::prefetch(int64_t layer) {
  if (layer < 0 || layer >= int64_t(layers_.size()) || layers_[size_t(layer)].experts == 0) return;
  if (Slot* slot = find(layer)) slot->awaited = true;
  else fill(choose(), layer);
}

ExpertWeights OffloadedWeights::experts(int64_t index, int64_t first, int64_t count) {
  const Layer& layer = layers_.at(size_t(index));
  MOEGRAFT_INVARIANT(first >= 0 && count > 0 && first + count <= layer.experts, "experts ", first, "+", count, " of ", layer.experts);
  if (!find(index)) {
    ++traffic_.late;
    prefetch(index);
  }
  Slot& slot = *find(index);
  slot.awaited = false;
  slot.used = ++clock_;
  if (slot.ready) slot.ready->block(current_stream(device()));
  ExpertWeights out;
  out.first = first;
  const int64_t E = layer.experts, F = layer.width, D = layer.depth;
  const at::Tensor gate_up = slot.buffer.narrow(0, 0, 2 * E * F * D).view({E, 2, F, D}), down = slot.buffer.narrow(0, 2 * E * F * D, E * F * D).view({E, D, F});
  for (int64_t e = first; e < first + count; ++e) {
    out.gate_FD.push_back(gate_up[e][0]);
    out.up_FD.push_back(gate_up[e][1]);
    out.down_DF.push_back(down[e]);
  }
  return out;
}

}  // namespace moegraft::model
