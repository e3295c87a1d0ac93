#include "moegraft/parallel/sharded_weights.h"

#include "libtorch.h"

#include <algorithm>

#include "groups.h"
#include "moegraft/base/check.h"

namespace moegraft::parallel {

ShardedWeights::ShardedWeights(std::shared_ptr<model::WeightProvider> rest, const distributed::Mesh& mesh,
                               int64_t buffers)
    : ExpertRing(std::move(rest), buffers),
      group_(split_data(mesh, "base shards")),
      under_way_(static_cast<size_t>(buffers)) {}
ShardedWeights::~ShardedWeights() = default;

void ShardedWeights::add_layer(const model::ExpertWeights& experts) {
  at::NoGradGuard no_grad;
  int64_t numel = 0;
  for (const auto* list : {&experts.gate_FD, &experts.up_FD, &experts.down_DF})
    for (const auto& t : *list) numel += t.numel();
  const int64_t each = (numel + group_->size() - 1) / group_->size();
  const auto matrices = declare_layer(experts, each * group_->size());
  parts_.emplace_back();
  if (numel == 0) return;
  // Our stretch of the matrices laid end to end; what is beyond the last one stays zero.
  const int64_t begin = group_->rank() * each, end = begin + each;
  const at::Tensor part = at::zeros({each}, at::TensorOptions(dtype()).device(device()));
  int64_t at_element = 0;
  for (const auto& t : matrices) {
    const int64_t from = std::max(begin, at_element), to = std::min(end, at_element + t.numel());
    if (from < to)
      part.narrow(0, from - begin, to - from).copy_(t.reshape({-1}).narrow(0, from - at_element, to - from));
    at_element += t.numel();
  }
  parts_.back() = part;
}

int64_t ShardedWeights::resident_bytes() const {
  int64_t bytes = 0;
  for (const auto& part : parts_)
    if (part.defined()) bytes += int64_t(part.nbytes());
  return bytes;
}

void ShardedWeights::fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) {
  const at::Tensor& part = parts_[size_t(layer)];
  at::Tensor whole = buffer.narrow(0, 0, part.numel() * group_->size());
  // Gloo's threads let go of their tensors some time after the gather is done: through a view of its own, that is not
  // taken for somebody holding the weights.
  if (whole.is_cpu()) whole = at::from_blob(whole.data_ptr(), whole.sizes(), whole.options());
  under_way_[size_t(slot)] = group_->all_gather(whole, part, "experts of layer " + std::to_string(layer));
}

void ShardedWeights::await(int64_t slot) {
  under_way_[size_t(slot)].wait();
  under_way_[size_t(slot)] = distributed::Pending();
}

}  // namespace moegraft::parallel
