#pragma once
#include <torch/types.h>

#include "moegraft/model/spec.h"

namespace moegraft::model {

struct RotaryTables {
  at::Tensor cos_TC, sin_TC;  // float32 [T, C/2]
};

// The frequencies of a model, on its device once, so that no call has to send them there.
class Rotary {
 public:
  Rotary(const DecoderSpec& spec, at::Device device);
  // Tables for the given positions. longest: the longest sequence of the call. Dynamic NTK depends on it beyond the
  // model's own positions, and then waits for the device; nothing else does.
  RotaryTables tables(const at::Tensor& positions_T, int64_t longest) const;

 private:
  const DecoderSpec spec_;
  at::Tensor frequencies_C_;  // float32 [C/2], of sequences within the model's positions
};

}  // namespace moegraft::model
