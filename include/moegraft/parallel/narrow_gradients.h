#pragma once
// Gradients that are kept in bf16 (train.gradients: bf16), where a process trains alone; with several,
// GradientReducer's buckets are.

#include "moegraft/model/registry.h"

namespace moegraft::parallel {

// A parameter's gradient becomes bf16 as soon as a backward pass has made it, so that the float32 ones of a layer or
// two exist at a time. Later micro-batches are added to it by autograd: in float32, rounded once each. Deterministic.
class NarrowGradients {
 public:
  // The registry is complete and outlives this.
  explicit NarrowGradients(model::ParameterRegistry& registry);
  ~NarrowGradients();
  NarrowGradients(const NarrowGradients&) = delete;

 private:
  model::ParameterRegistry& registry_;
};

}  // namespace moegraft::parallel
