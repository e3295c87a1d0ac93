#pragma once
#include <torch/types.h>

#include "moegraft/model/spec.h"

namespace moegraft::model {

struct RotaryTables {
  at::Tensor cos_TC, sin_TC;  // float32 [T, C/2]
};
// Tables for the given positions. longest: the longest sequence of the call (dynamic NTK depends on it).
RotaryTables rotary_tables(const DecoderSpec& spec, const at::Tensor& positions_T, int64_t longest);

}  // namespace moegraft::model
