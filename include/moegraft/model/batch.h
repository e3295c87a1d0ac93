#pragma once
// Packed sequences: never padded. Modality 0 is text; m >= 1 is the m-th entry of the run's `modalities`.

#include <torch/types.h>

#include <vector>

namespace moegraft::model {

struct PackedBatch {
  at::Tensor ids_T;        // int64, in [0, V + new rows)
  at::Tensor modality_T;   // int64; undefined means all text
  at::Tensor positions_T;  // int64, restart at 0 in each sequence
  std::vector<int64_t> cu_seqlens;  // [num_sequences + 1], cu_seqlens[0] = 0, back() = T
  at::Tensor labels_T;     // int64: the id that position t should predict (already shifted), -100 where there is none; undefined in inference

  int64_t num_tokens() const { return ids_T.size(0); }
  int64_t num_sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
};

constexpr int64_t kNoLabel = -100;

// [B,S] -> packed, positions 0..S-1 in each row, all text.
PackedBatch pack_rows(const at::Tensor& ids_BS);

}  // namespace moegraft::model
