#pragma once
// The new rows as PEFT's trainable tokens: despite the tensors' name (…_delta) they replace the base's rows.

#include <torch/types.h>

#include <string>
#include <vector>

#include "moegraft/graft/grafted_model.h"

namespace moegraft::exporting {

struct Rows {
  const char* module;    // "embed_tokens" | "lm_head"
  at::Tensor tensor_ND;  // float32 on the CPU, ids V..V+N-1 in order
  std::string key() const;
};

// Embedding rows, and head rows unless the base ties them (PEFT then uses the embedding's for both). Empty without new
// rows.
std::vector<Rows> new_rows(const graft::GraftedModel& model);

}  // namespace moegraft::exporting
