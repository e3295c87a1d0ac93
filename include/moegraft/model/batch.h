#pragma once
// Packed sequences: never padded. Modality 0 is text; m >= 1 is the m-th entry of the run's `modalities`.

#include <torch/types.h>

#include <memory>
#include <vector>

namespace moegraft::model {

struct SplitBatch;

// What the host must know of a batch before it can launch a step. Made beside the batch, on the CPU (in training by the
// data worker), so that no step has to ask the device. Index tensors are int64, rising, and move with the batch.
struct BatchFacts {
  // Ids by owner: set 0 is the base's rows, set n the n-th set of new rows. Set s is [id_bounds[s], id_bounds[s + 1]);
  // begins with {0, V}.
  std::vector<int64_t> id_bounds;
  int64_t num_modalities = 1;               // largest modality + 1
  int64_t num_labels = 0;                   // positions with a label
  int64_t longest = 0;                      // tokens of the longest sequence
  std::vector<int64_t> text_prefix;         // [num_sequences]: leading tokens of modality 0
  std::vector<int64_t> text_prefix_ids;     // their ids, sequence after sequence
  std::vector<at::Tensor> modality_tokens;  // [num_modalities]: the tokens of each modality
  std::vector<at::Tensor> id_tokens;        // [sets]: the tokens whose id is in the set
  std::vector<at::Tensor> label_tokens;  // [sets]: the positions whose label is in the set; empty vector without labels
  at::Tensor cu_seqlens;                 // int32 [num_sequences + 1]
  std::shared_ptr<const SplitBatch> split;  // where there are labels and prefix_is_worth_it; else null
  bool placeholder = false;  // one token without a label, in place of the batch that this rank has not got
};

struct PackedBatch {
  at::Tensor ids_T;                 // int64, in [0, V + new rows)
  at::Tensor modality_T;            // int64; undefined means all text
  at::Tensor positions_T;           // int64, restart at 0 in each sequence
  std::vector<int64_t> cu_seqlens;  // [num_sequences + 1], cu_seqlens[0] = 0, back() = T
  at::Tensor labels_T;  // int64: the id that position t should predict (already shifted), -100 where there is none;
                        // undefined in inference
  // Of these very tensors: whoever replaces one of them resets this. May be null; describe_batch makes it.
  std::shared_ptr<const BatchFacts> facts = nullptr;

  int64_t num_tokens() const { return ids_T.size(0); }
  int64_t num_sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
};

// A batch cut at each sequence's first token that is not text.
struct SplitBatch {
  PackedBatch prefix, rest;               // with facts; as many sequences as the batch, some of them empty
  at::Tensor prefix_tokens, rest_tokens;  // int64: where their tokens lie in the batch
};

constexpr int64_t kNoLabel = -100;

// Plain loops on the host, in the calling thread; index tensors land on the batch's device (a batch on a GPU is copied
// to the host: a sync). id_bounds: as in BatchFacts. UserError: an id outside [0, id_bounds.back()), a label beyond it,
// a negative modality.
BatchFacts describe_batch(const PackedBatch& batch, std::vector<int64_t> id_bounds);

// Cuts a batch with facts, on the host likewise.
SplitBatch split_prefix(const PackedBatch& batch);
// Whether the text before other modalities is worth a pass of its own: a second, small pass through the layers costs
// reading their weights again.
bool prefix_is_worth_it(const BatchFacts& facts, int64_t num_tokens);

// [B,S] -> packed, positions 0..S-1 in each row, all text.
PackedBatch pack_rows(const at::Tensor& ids_BS);

}  // namespace moegraft::model
