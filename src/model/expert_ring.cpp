#include "moegraft/model/expert_ring.h"

#include "libtorch.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "moegraft/base/check.h"

namespace moegraft::model {

int64_t RingOrder::find(int64_t layer) const {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (slots_[i].layer == layer) return int64_t(i);
  return -1;
}

// An empty buffer, else the one whose layer was asked for longest ago; one that waits to be asked for only when all do.
RingOrder::Place RingOrder::prefetch(int64_t layer) {
  if (const int64_t i = find(layer); i >= 0) {
    slots_[size_t(i)].awaited = true;
    return {i};
  }
  const auto least = std::min_element(slots_.begin(), slots_.end(), [](const Slot& a, const Slot& b) {
    return std::tuple(a.layer >= 0, a.awaited, a.used) < std::tuple(b.layer >= 0, b.awaited, b.used);
  });
  least->layer = layer;
  return {least - slots_.begin(), true, std::exchange(least->awaited, true)};
}

int64_t RingOrder::use(int64_t layer) {
  const int64_t i = find(layer);
  MOEGRAFT_INVARIANT(i >= 0, "RingOrder: layer ", layer, " is in no buffer");
  slots_[size_t(i)].awaited = false;
  slots_[size_t(i)].used = ++clock_;
  return i;
}

ExpertRing::ExpertRing(std::shared_ptr<WeightProvider> rest, int64_t buffers)
    : rest_(std::move(rest)), order_(buffers), buffers_(size_t(buffers)) {
  MOEGRAFT_INVARIANT(rest_ && buffers >= 2, "ExpertRing: ", buffers, " buffers; one computes while another is filled");
}

std::vector<at::Tensor> ExpertRing::declare_layer(const ExpertWeights& experts, int64_t room) {
  std::vector<at::Tensor> parts;
  Shape shape;
  shape.first = experts.first;
  shape.experts = experts.count();
  if (shape.experts > 0) {
    shape.width = experts.gate_FD.front().size(0);
    shape.depth = experts.gate_FD.front().size(1);
    for (size_t e = 0; e < experts.gate_FD.size(); ++e)
      for (const auto* list : {&experts.gate_FD, &experts.up_FD}) parts.push_back((*list)[e].detach());
    for (const auto& t : experts.down_DF) parts.push_back(t.detach());
    for (const auto& t : parts)
      MOEGRAFT_INVARIANT(t.scalar_type() == dtype() && t.numel() == shape.width * shape.depth,
                         "ExpertRing: an expert's matrix ", t.sizes(), " ", c10::toString(t.scalar_type()));
  }
  largest_ = std::max({largest_, room, 3 * shape.experts * shape.width * shape.depth});
  layers_.push_back(shape);
  return parts;
}

void ExpertRing::fill(int64_t slot, int64_t layer) {
  const at::NoGradGuard no_grad;
  at::Tensor& buffer = buffers_[size_t(slot)];
  const bool held = buffer.defined() && buffer.storage().use_count() > 1;
  if (held) ++traffic_.replaced;
  if (held || !buffer.defined() || buffer.numel() < largest_)
    buffer = at::empty({largest_}, at::TensorOptions(dtype()).device(device()));
  ++traffic_.copies;
  fetch(layer, slot, buffer);
}

void ExpertRing::prefetch(int64_t layer) {
  if (layer < 0 || layer >= int64_t(layers_.size()) || layers_[size_t(layer)].experts == 0) return;
  const RingOrder::Place place = order_.prefetch(layer);
  if (place.under_way) await(place.slot);
  if (place.fetch) fill(place.slot, layer);
}

ExpertWeights ExpertRing::experts(int64_t index, int64_t first, int64_t count) {
  const Shape& layer = layers_.at(size_t(index));
  MOEGRAFT_INVARIANT(first >= layer.first && count > 0 && first + count <= layer.first + layer.experts, "experts ",
                     first, "+", count, " of ", layer.first, "+", layer.experts);
  if (order_.find(index) < 0) {
    ++traffic_.late;
    prefetch(index);
  }
  const int64_t slot = order_.use(index);
  await(slot);
  const at::Tensor& buffer = buffers_[size_t(slot)];
  ExpertWeights out;
  out.first = first;
  const int64_t E = layer.experts, F = layer.width, D = layer.depth;
  const at::Tensor gate_up = buffer.narrow(0, 0, 2 * E * F * D).view({E, 2, F, D}),
                   down = buffer.narrow(0, 2 * E * F * D, E * F * D).view({E, D, F});
  for (int64_t e = first - layer.first; e < first - layer.first + count; ++e) {
    out.gate_FD.push_back(gate_up[e][0]);
    out.up_FD.push_back(gate_up[e][1]);
    out.down_DF.push_back(down[e]);
  }
  return out;
}

}  // namespace moegraft::model
