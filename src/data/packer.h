#pragma once
// Fills batches from a sequence of documents, by their outlines alone; shared by training and evaluation.

#include <cstdint>
#include <vector>

#include "moegraft/data/sequence.h"

namespace moegraft::data {

struct Document {
  int64_t source = 0, index = 0;
  bool drop_caption = false;
  Outline outline;
  int64_t draw = 0;  // number of the draw that it came by
};

// Where documents come from. current() stays the same until advance(); nullptr: no more.
class DocumentFeed {
 public:
  virtual ~DocumentFeed() = default;
  virtual const Document* current() = 0;
  virtual void advance() = 0;
  virtual void on_truncated(const Document&) {}
  virtual void on_skipped(const Document&) {}
};

// Tokens [begin, begin + count) of an assembled document.
struct Piece {
  int64_t source = 0, index = 0, begin = 0, count = 0;
  bool drop_caption = false;
  int64_t draw = 0;
};

struct PlannedSequence {
  std::vector<Piece> pieces;
  uint64_t modalities = 0;
  int64_t tokens = 0, labels = 0, new_tokens = 0;
};

struct Packer {
  bool stream = false;
  int64_t sequence_length = 0, budget = 0;

  // offset: how much of the current document earlier batches have taken (packing stream). Empty when the feed is.
  std::vector<PlannedSequence> fill(DocumentFeed& feed, int64_t& offset) const;
};

// Makes planned sequences; keeps the last document, since the next piece is often of the same.
class Assembler {
 public:
  // rules: of each source. What is replaced (data.caption_noise, data.code_noise) is drawn by Rng(seed, its key, draw).
  Assembler(const std::vector<Source>& sources, const model::Vocabulary& vocabulary, std::vector<DataConfig> rules,
            uint64_t seed)
      : sources_(sources), vocabulary_(vocabulary), rules_(std::move(rules)), seed_(seed) {}
  Sequence make(const PlannedSequence& planned);

 private:
  const std::vector<Source>& sources_;
  const model::Vocabulary& vocabulary_;
  const std::vector<DataConfig> rules_;
  const uint64_t seed_;
  Piece kept_{-1};
  Sequence document_;
};

}  // namespace moegraft::data
