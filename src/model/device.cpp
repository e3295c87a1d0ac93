#include "moegraft/model/device.h"

#include "libtorch.h"

namespace moegraft::model {

PackedBatch to_device(const PackedBatch& batch, at::Device device) {
  if (batch.ids_T.device() == device) return batch;
  const auto move = [&](const at::Tensor& t) { return t.defined() ? t.to(device) : t; };
  return {move(batch.ids_T), move(batch.modality_T), move(batch.positions_T), batch.cu_seqlens, move(batch.labels_T)};
}

}  // namespace moegraft::model
