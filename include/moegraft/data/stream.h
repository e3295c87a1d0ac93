#pragma once
// Batches of packed sequences. The order of documents is a function of (seed, cursor) alone: a restored stream goes on bit for bit,
// whatever the number of processes; ranks share one stream and each takes its own micro-batches.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/data/config.h"
#include "moegraft/data/sequence.h"
#include "moegraft/model/batch.h"
#include "moegraft/model/vocabulary.h"

namespace moegraft::data {

struct StreamCounts {
  int64_t documents = 0;  // drawn
  int64_t truncated = 0;  // text documents cut at sequence_length
  int64_t skipped = 0;    // documents of another modality that are longer than sequence_length
};

// Endless training batches. Draw d picks a source by weight with Rng(seed, "data.source", d); source s walks its documents in an order that
// is reshuffled every epoch, Rng(seed, "data.shuffle.<s>", epoch), so every document of a source comes once per epoch.
// Captions are dropped by Rng(seed, "data.caption_dropout", d).
//   packing documents: documents are taken whole until the next would not fit; each is a sequence. A text document longer than
//     sequence_length is cut, one with another modality is skipped; both are counted and said once.
//   packing stream: text documents are joined and cut every sequence_length tokens (a document goes on in the next sequence or batch);
//     documents with another modality stay whole. A batch of text alone is full to the last token.
class BatchStream {
 public:
  // micro_batch_tokens: most tokens of a batch; 0: config.tokens_per_step. UsageError: no source, weights that sum to 0, a budget below
  // sequence_length (documents). UserError: what Source says.
  BatchStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary, uint64_t seed, int64_t micro_batch_tokens = 0);
  ~BatchStream();
  BatchStream(BatchStream&&) noexcept;

  model::PackedBatch next();  // CPU tensors, at least one sequence
  std::string state() const;  // JSON; small
  // UserError: not a cursor, or one of other data (number of sources or documents, seed).
  void restore(const std::string& state);
  StreamCounts counts() const;
  double epochs() const;  // documents drawn / documents there are

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Every source once through in stored order, without caption dropout; at most max_tokens (0: all), shared equally between the sources, at
// least one document of each.
class EvalStream {
 public:
  EvalStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary, int64_t max_tokens = 0, int64_t micro_batch_tokens = 0);
  ~EvalStream();
  EvalStream(EvalStream&&) noexcept;

  std::optional<model::PackedBatch> next();
  void rewind();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moegraft::data
