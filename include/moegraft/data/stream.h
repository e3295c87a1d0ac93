#pragma once
// Batches of packed sequences. The order of documents is a function of (seed, cursor) alone, and so is the set of
// sequences of a step: a restored stream goes on bit for bit, and another number of processes or micro-batches only
// deals the same sequences differently.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/data/config.h"
#include "moegraft/data/deal.h"
#include "moegraft/data/sequence.h"
#include "moegraft/model/batch.h"
#include "moegraft/model/vocabulary.h"

namespace moegraft::data {

struct StreamCounts {
  int64_t documents = 0;  // drawn
  int64_t truncated = 0;  // text documents cut at sequence_length
  int64_t skipped = 0;    // documents of another modality that are longer than sequence_length
};

// One process's share of one optimizer step.
struct StepBatch {
  // [accumulation], CPU tensors with facts. A part that got no sequence is a placeholder (facts->placeholder): one text
  // token without a label.
  std::vector<model::PackedBatch> micro_batches;
  int64_t num_labels = 0, num_tokens = 0;  // of the whole step, all ranks; placeholders are not counted
  std::vector<int64_t> rank_tokens;        // [world_size]: their sum is num_tokens
};

// Endless training steps with a cursor: what a training loop draws from.
class BatchFeed {
 public:
  using Warn = std::function<void(const std::string&)>;
  virtual ~BatchFeed() = default;

  virtual StepBatch next() = 0;
  // Everything that follows is about the steps handed out so far.
  virtual std::string state() const = 0;  // JSON; small; the same on every rank
  // UserError: not a cursor, or one of other data (number of sources or documents, seed) or batching.
  virtual void restore(const std::string& state) = 0;
  virtual StreamCounts counts() const = 0;
  virtual double epochs() const = 0;  // documents drawn / documents there are
  // Where next() says what the user should know; at first the log.
  virtual void set_warn(Warn warn) = 0;
};

// With batching modality: the steps' worth of tokens that are drawn ahead at a time, unless that is more documents than
// there are.
constexpr int64_t kWindowSteps = 64;

// The sequences of a step, by their sizes alone.
struct StepOutline {
  std::vector<uint64_t> modalities;  // [sequences]; bit m: its documents hold modality m as they are stored
  std::vector<int64_t> tokens, labels, new_tokens;  // [sequences]; new: of other modalities than text
};

// The steps of shards. Draw d picks a source by weight with Rng(seed, "data.source", d); source s walks its documents
// in an order that is reshuffled every epoch, Rng(seed, "data.shuffle.<s>", epoch), so every document of a source comes
// once per epoch. Captions are dropped by Rng(seed, "data.caption_dropout", d).
//   packing documents: documents are taken whole until the next would not fit; each is a sequence. A text document
//   longer than
//     sequence_length is cut, one with another modality is skipped; both are counted and said once.
//   packing stream: text documents are joined and cut every sequence_length tokens (a document goes on in the next
//   sequence or step);
//     documents with another modality stay whole. A step of text alone is full to the last token.
//   batching mixed: a step is the next documents drawn.
//   batching modality: a window of documents is drawn ahead (kWindowSteps), grouped by the modalities they are stored
//   with, sorted by length, cut into steps of
//     about even size and those shuffled by Rng(seed, "data.mega_batch", window). Every document of the window is in
//     one of its steps; a document with a dropped caption stays among its like. counts() then has truncated and skipped
//     documents of the whole window.
// The step's sequences are then dealt (deal.h); within a micro-batch they keep their order. A process reads the ids of
// its own sequences only: of the others it reads where modalities change, a byte a token. Not thread-safe, but free of
// other threads: no OpenMP, so that a worker may run it beside the step.
class BatchStream : public BatchFeed {
 public:
  // UsageError: no source, weights that sum to 0, tokens_per_step below sequence_length (documents). UserError: what
  // Source says.
  BatchStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary,
              uint64_t seed, const Share& share = {});
  ~BatchStream() override;
  BatchStream(BatchStream&&) noexcept;

  StepBatch next() override;
  // next() without making anything: goes on by a step and says what it holds.
  StepOutline skip();
  std::string state() const override;
  void restore(const std::string& state) override;
  StreamCounts counts() const override;
  double epochs() const override;
  void set_warn(Warn warn) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Every source once through in stored order, without caption dropout; at most max_tokens (0: all), shared equally
// between the sources, at least one document of each. Batches of at most tokens_per_step tokens, the same for any
// number of ranks; rank r gets batch i where i % world_size == r. Every rank gets as many: a placeholder
// (facts->placeholder) where there is no batch left for it.
class EvalStream {
 public:
  // share.accumulation is not used.
  EvalStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary,
             int64_t max_tokens = 0, const Share& share = {});
  ~EvalStream();
  EvalStream(EvalStream&&) noexcept;

  std::optional<model::PackedBatch> next();  // CPU tensors with facts
  void rewind();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moegraft::data
