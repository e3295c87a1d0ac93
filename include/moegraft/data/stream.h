#pragma once
// Batches of packed sequences. The order of documents is a function of (seed, cursor) alone: a restored stream goes on bit for bit,
// whatever the number of processes; ranks share one stream and each takes its own micro-batches.

#include <cstdint>
#include <functional>
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

// Endless training batches with a cursor: what a training loop draws from.
class BatchFeed {
 public:
  using Warn = std::function<void(const std::string&)>;
  virtual ~BatchFeed() = default;

  virtual model::PackedBatch next() = 0;  // CPU tensors with facts, at least one sequence
  // Everything that follows is about the batches handed out so far.
  virtual std::string state() const = 0;  // JSON; small
  // UserError: not a cursor, or one of other data (number of sources or documents, seed).
  virtual void restore(const std::string& state) = 0;
  virtual StreamCounts counts() const = 0;
  virtual double epochs() const = 0;  // documents drawn / documents there are
  // Where next() says what the user should know; at first the log.
  virtual void set_warn(Warn warn) = 0;
};

// The batches of shards. Draw d picks a source by weight with Rng(seed, "data.source", d); source s walks its documents in an order that
// is reshuffled every epoch, Rng(seed, "data.shuffle.<s>", epoch), so every document of a source comes once per epoch.
// Captions are dropped by Rng(seed, "data.caption_dropout", d).
//   packing documents: documents are taken whole until the next would not fit; each is a sequence. A text document longer than
//     sequence_length is cut, one with another modality is skipped; both are counted and said once.
//   packing stream: text documents are joined and cut every sequence_length tokens (a document goes on in the next sequence or batch);
//     documents with another modality stay whole. A batch of text alone is full to the last token.
// Not thread-safe, but free of other threads: no OpenMP, so that a worker may run it beside the step.
class BatchStream : public BatchFeed {
 public:
  // micro_batch_tokens: most tokens of a batch; 0: config.tokens_per_step. UsageError: no source, weights that sum to 0, a budget below
  // sequence_length (documents). UserError: what Source says.
  BatchStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary, uint64_t seed, int64_t micro_batch_tokens = 0);
  ~BatchStream() override;
  BatchStream(BatchStream&&) noexcept;

  model::PackedBatch next() override;
  std::string state() const override;
  void restore(const std::string& state) override;
  StreamCounts counts() const override;
  double epochs() const override;
  void set_warn(Warn warn) override;

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

  std::optional<model::PackedBatch> next();  // CPU tensors with facts
  void rewind();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moegraft::data
