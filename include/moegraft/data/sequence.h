#pragma once
// From stored documents to token sequences with labels: where begin, end, BOS and EOS go and what is learnt from.

#include <cstdint>
#include <string>
#include <vector>

#include "moegraft/base/rng.h"
#include "moegraft/data/config.h"
#include "moegraft/data/shard.h"
#include "moegraft/model/batch.h"
#include "moegraft/model/vocabulary.h"

namespace moegraft::data {

// labels[t] is the id that position t should predict (already shifted), kNoLabel where there is none.
struct Sequence {
  std::vector<int64_t> ids, modality, labels;
  bool text_only = true;
  int64_t size() const { return static_cast<int64_t>(ids.size()); }
};

// A shard set seen through a run's vocabulary.
class Source {
 public:
  // UserError: what ShardSet says; a modality that the run does not have; another number of codes, codebooks or codes
  // an item, a larger text vocabulary.
  Source(const std::string& path, const model::Vocabulary& vocabulary);
  const ShardSet& shards() const { return shards_; }
  int64_t num_documents() const { return shards_.num_documents(); }
  // Segment::modality is the modality id of the vocabulary.
  std::vector<Segment> document(int64_t index) const;
  std::vector<Segment> runs(int64_t index) const;  // with their ids unread

 private:
  std::vector<Segment> in_vocabulary(std::vector<Segment> segments) const;
  ShardSet shards_;
  std::vector<int64_t> modality_;
};

// Puts begin and end around each item of codes, BOS before everything, EOS behind a document that ends in text.
// Labels: a document of text alone predicts every token; in one that holds another modality codes and end are
// predicted, begin never (generation forces it), text only with caption_labels. drop_caption leaves the text segments
// out. segments: modality ids of the vocabulary, as Source::document gives them.
Sequence assemble(const std::vector<Segment>& segments, const model::Vocabulary& vocabulary, const DataConfig& config,
                  bool drop_caption = false);

// Replaces each text token of a sequence that holds another modality by a random one with probability `share`; BOS, EOS
// and labels stay (data.caption_noise).
void replace_caption(Sequence& sequence, const model::Vocabulary& vocabulary, double share, Rng& rng);

// Replaces each code by a random one of its codebook with probability `share`; begin and end tokens and labels stay
// (data.code_noise).
void replace_codes(Sequence& sequence, const model::Vocabulary& vocabulary, double share, Rng& rng);

// What assemble() would make, known from the lengths of the segments: their ids are not read.
struct Outline {
  int64_t size = 0, num_labels = 0;
  int64_t new_tokens = 0;  // of other modalities than text
  bool text_only = true;
  // Of the document as it is stored: its length with the caption, and a bit for each modality. A dropped caption
  // changes neither.
  int64_t stored_size = 0;
  uint64_t modalities = 0;
};
Outline outline(const std::vector<Segment>& segments, const model::Vocabulary& vocabulary, const DataConfig& config,
                bool drop_caption = false);

// True for text beside exactly one item of another modality: what caption dropout applies to.
bool is_captioned_item(const std::vector<Segment>& segments, const model::Vocabulary& vocabulary);

// Lays sequences end to end; positions restart at 0 in each.
model::PackedBatch pack(const std::vector<Sequence>& sequences);

// One token of text (BOS, or id 0) without a label, with facts: what a process computes that has no part of a step.
model::PackedBatch placeholder_batch(const model::Vocabulary& vocabulary);

}  // namespace moegraft::data
