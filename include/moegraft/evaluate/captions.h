#pragma once
// Likelihood of pictures given their captions, no caption, and other pictures' captions; and what code frequencies
// alone would reach.

#include <string>
#include <vector>

#include "moegraft/data/config.h"
#include "moegraft/data/sequence.h"
#include "moegraft/graft/grafted_model.h"

namespace moegraft::evaluate {

// A captioned picture of a shard, owning its ids.
struct CaptionedItem {
  std::vector<int32_t> before, codes, after;  // caption tokens around the picture (usually all before)
};

// At most max_items documents with text and exactly one picture, spread evenly over the shards. UserError when there is
// none.
std::vector<CaptionedItem> read_captioned_items(const std::string& shards, const model::Vocabulary& vocabulary,
                                                const model::ModalityTokens& tokens, int64_t max_items);

// For item i the index of an item whose caption it borrows: another caption of another picture, in an order drawn by
// seed. UserError when all are alike.
std::vector<int64_t> borrow_captions(const std::vector<CaptionedItem>& items, uint64_t seed);

// Frequencies of codes and of the end token over training items, with one added to each.
struct Unigram {
  std::vector<int64_t> counts;  // [N + 1]; the last is the end token's
  double nll(int64_t symbol) const;
  // Nats per label (codes and end), as the model's likelihood counts them.
  double nll(const std::vector<CaptionedItem>& items) const;
};
Unigram count_codes(const std::vector<std::string>& shards, const model::Vocabulary& vocabulary,
                    const model::ModalityTokens& tokens);

struct CaptionUse {
  int64_t items = 0, labels = 0;                         // labels: codes and end
  double nll_true = 0, nll_empty = 0, nll_shuffled = 0;  // nats per label
  double prompt_used() const { return nll_shuffled - nll_true; }
};

// rules: BOS as in training. UserError when a sequence is longer than the model's positions.
CaptionUse measure_captions(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                            const std::vector<CaptionedItem>& items, const data::DataConfig& rules, uint64_t seed);

}  // namespace moegraft::evaluate
