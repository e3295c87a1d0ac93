#pragma once
#include "moegraft/model/batch.h"

namespace moegraft::model {

// Copies a batch to `device`; the batch itself when it is there already.
PackedBatch to_device(const PackedBatch& batch, at::Device device);

}  // namespace moegraft::model
