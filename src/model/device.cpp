#include "moegraft/model/device.h"

#include "libtorch.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/kernels/cpu.h"
#include "moegraft/kernels/current_device.h"
#include "moegraft/kernels/device_numerics.h"
#include "moegraft/model/config.h"

namespace moegraft::model {
namespace {

template <class Move>
SplitBatch moved(const SplitBatch& split, const Move& move);

// Applies `move` to every tensor of a batch.
template <class Move>
PackedBatch moved(const PackedBatch& batch, const Move& move_defined) {
  const auto move = [&](const at::Tensor& t) { return t.defined() ? move_defined(t) : t; };
  PackedBatch out{move(batch.ids_T), move(batch.modality_T), move(batch.positions_T), batch.cu_seqlens,
                  move(batch.labels_T)};
  if (!batch.facts) return out;
  BatchFacts facts = *batch.facts;
  for (auto* indices : {&facts.modality_tokens, &facts.id_tokens, &facts.label_tokens})
    for (at::Tensor& t : *indices) t = move(t);
  facts.cu_seqlens = move(facts.cu_seqlens);
  if (facts.split) facts.split = std::make_shared<const SplitBatch>(moved(*facts.split, move_defined));
  out.facts = std::make_shared<const BatchFacts>(std::move(facts));
  return out;
}
template <class Move>
SplitBatch moved(const SplitBatch& split, const Move& move) {
  return {moved(split.prefix, move), moved(split.rest, move), move(split.prefix_tokens), move(split.rest_tokens)};
}

// Only towards the device: the host must not read a copy that is still under way.
auto mover(const at::Tensor& from, at::Device device) {
  return [device, non_blocking = from.is_cpu()](const at::Tensor& t) { return t.to(device, non_blocking); };
}

}  // namespace

PackedBatch to_device(const PackedBatch& batch, at::Device device) {
  if (batch.ids_T.device() == device) return batch;
  return moved(batch, mover(batch.ids_T, device));
}
SplitBatch to_device(const SplitBatch& split, at::Device device) {
  if (split.prefix_tokens.device() == device) return split;
  return moved(split, mover(split.prefix_tokens, device));
}

PackedBatch pin(const PackedBatch& batch) {
  MOEGRAFT_INVARIANT(batch.ids_T.is_cpu(), "only a batch on the CPU can be pinned");
  return moved(batch, [](const at::Tensor& t) {
    // Not Tensor::pin_memory: its copy may open an OpenMP team in a thread that is to stay single.
    const at::Tensor dense = t.contiguous();
    at::Tensor out = at::empty(dense.sizes(), dense.options().pinned_memory(true));
    if (dense.nbytes() > 0) std::memcpy(out.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
    return out;
  });
}

std::optional<int64_t> free_memory(at::Device device) {
  if (device.is_cpu() || (device.is_cuda() && !torch::cuda::is_available())) return std::nullopt;
  auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
  if (!allocator) return std::nullopt;
  const auto index = device.has_index() ? device.index() : kernels::current_device(device.type()).index();
  return int64_t(allocator->getMemoryInfo(index).first);
}

std::vector<std::string> known_cpu_paths() { return kernels::cpu_path_choices(); }
std::vector<std::string> known_attention_kernels() { return kernels::attention_choices(); }

}  // namespace moegraft::model
