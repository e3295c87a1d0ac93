#pragma once
// The endless order in which a run draws documents.

#include <cstdint>
#include <vector>

#include "data/packer.h"

namespace moegraft::data {

// Where the order stands: draws made, and of them from each source.
struct DrawCursor {
  int64_t draws = 0;
  std::vector<int64_t> taken;
};

// Draw d picks a source by weight, Rng(seed, "data.source", d); source s walks an order of its documents (or items)
// that is reshuffled every epoch, Rng(seed, "data.shuffle.<s>", epoch); which document of an item comes is Rng(seed,
// "data.item", d). Captions are dropped by Rng(seed, "data.caption_dropout", d). Documents are known by their outlines:
// no id is read.
class Draws {
 public:
  Draws(const std::vector<SourceConfig>& configs, const DataConfig& config, const model::Vocabulary& vocabulary,
        uint64_t seed);

  const Document& current();
  void advance();
  const DrawCursor& cursor() const { return cursor_; }
  void move_to(DrawCursor cursor);  // trusts it

  const std::vector<Source>& sources() const { return sources_; }
  // Documents of an epoch: of each source, of all, of those with a weight above 0.
  std::vector<int64_t> num_documents() const;
  int64_t total_documents() const;
  int64_t reachable_documents() const;

 private:
  bool by_item(size_t source) const { return configs_[source].sample_by == "item"; }
  int64_t epoch_size(size_t source) const;
  int64_t pick_source() const;
  const std::vector<SourceConfig> configs_;
  std::vector<Source> sources_;
  std::vector<double> cumulative_;       // weights
  const std::vector<DataConfig> rules_;  // of each source
  const model::Vocabulary& vocabulary_;
  uint64_t seed_;
  DrawCursor cursor_;
  // Derived from the cursor.
  std::vector<int64_t> shuffled_epoch_;
  std::vector<std::vector<int64_t>> order_;
  bool loaded_ = false;
  Document document_;
};

// `config` as it holds for each source.
std::vector<DataConfig> rules_of(const std::vector<SourceConfig>& sources, const DataConfig& config);

std::vector<Source> open_sources(const std::vector<SourceConfig>& configs, const model::Vocabulary& vocabulary,
                                 const char* key);

}  // namespace moegraft::data
