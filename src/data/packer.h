#pragma once
// Fills batches from a sequence of documents; shared by training and evaluation.

#include <cstdint>
#include <vector>

#include "moegraft/data/sequence.h"

namespace moegraft::data {

// Where documents come from. current() stays the same until advance(); nullptr: no more.
class DocumentFeed {
 public:
  virtual ~DocumentFeed() = default;
  virtual const Sequence* current() = 0;
  virtual void advance() = 0;
  virtual void on_truncated() = 0;
  virtual void on_skipped() = 0;
};

struct Packer {
  bool stream = false;
  int64_t sequence_length = 0, budget = 0;

  // offset: how much of the current document earlier batches have taken (packing stream). Empty when the feed is.
  std::vector<Sequence> fill(DocumentFeed& feed, int64_t& offset) const;
};

}  // namespace moegraft::data
