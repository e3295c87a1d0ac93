#include "data/draws.h"

#include <numeric>
#include <string>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/rng.h"

namespace moegraft::data {

std::vector<Source> open_sources(const std::vector<SourceConfig>& configs, const model::Vocabulary& vocabulary,
                                 const char* key) {
  MOEGRAFT_CHECK_USAGE(!configs.empty(), key, " must name at least one source");
  std::vector<Source> sources;
  for (const auto& config : configs) sources.emplace_back(config.path, vocabulary);
  return sources;
}

std::vector<DataConfig> rules_of(const std::vector<SourceConfig>& sources, const DataConfig& config) {
  std::vector<DataConfig> rules(sources.size(), config);
  for (size_t s = 0; s < sources.size(); ++s) rules[s].add_bos = sources[s].add_bos.value_or(config.add_bos);
  return rules;
}

Draws::Draws(const std::vector<SourceConfig>& configs, const DataConfig& config, const model::Vocabulary& vocabulary,
             uint64_t seed)
    : configs_(configs),
      sources_(open_sources(configs, vocabulary, "data.train")),
      rules_(rules_of(configs, config)),
      vocabulary_(vocabulary),
      seed_(seed) {
  for (size_t s = 0; s < sources_.size(); ++s)
    if (by_item(s) && epoch_size(s) == sources_[s].num_documents())
      log::warning("data.train[", s, "].sample_by is item, but ", configs_[s].path,
                   " says of no two documents that they are one item: it is sampled by document (sets made before "
                   "items were stored are prepared again)");
  double total = 0;
  for (const auto& source : configs) cumulative_.push_back(total += source.weight);
  MOEGRAFT_CHECK_USAGE(total > 0, "the weights of data.train must not all be 0");
  cursor_.taken.assign(sources_.size(), 0);
  shuffled_epoch_.assign(sources_.size(), -1);
  order_.resize(sources_.size());
}

std::vector<int64_t> Draws::num_documents() const {
  std::vector<int64_t> out;
  for (size_t s = 0; s < sources_.size(); ++s) out.push_back(epoch_size(s));
  return out;
}

int64_t Draws::total_documents() const {
  const auto each = num_documents();
  return std::accumulate(each.begin(), each.end(), int64_t{0});
}

int64_t Draws::reachable_documents() const {
  int64_t sum = 0;
  for (size_t s = 0; s < sources_.size(); ++s)
    if (cumulative_[s] > (s > 0 ? cumulative_[s - 1] : 0)) sum += epoch_size(s);
  return sum;
}

int64_t Draws::epoch_size(size_t source) const {
  return by_item(source) ? sources_[source].shards().num_items() : sources_[source].num_documents();
}

int64_t Draws::pick_source() const {
  const double point = Rng(seed_, "data.source", static_cast<uint64_t>(cursor_.draws)).uniform() * cumulative_.back();
  for (size_t s = 0; s < cumulative_.size(); ++s)
    if (point < cumulative_[s]) return static_cast<int64_t>(s);
  return static_cast<int64_t>(cumulative_.size()) - 1;
}

const Document& Draws::current() {
  if (loaded_) return document_;
  const int64_t s = pick_source();
  const auto at = static_cast<size_t>(s);
  const int64_t n = epoch_size(at), epoch = cursor_.taken[at] / n;
  if (shuffled_epoch_[at] != epoch) {
    order_[at] = Rng(seed_, "data.shuffle." + std::to_string(s), static_cast<uint64_t>(epoch)).permutation(n);
    shuffled_epoch_[at] = epoch;
  }
  int64_t index = order_[at][static_cast<size_t>(cursor_.taken[at] % n)];
  if (by_item(at)) {
    const Item item = sources_[at].shards().item(index);
    index = item.first +
            (item.count > 1 ? Rng(seed_, "data.item", static_cast<uint64_t>(cursor_.draws)).below(item.count) : 0);
  }
  const auto segments = sources_[at].runs(index);
  const DataConfig& rules = rules_[at];
  const bool drop =
      rules.caption_dropout > 0 && is_captioned_item(segments, vocabulary_) &&
      Rng(seed_, "data.caption_dropout", static_cast<uint64_t>(cursor_.draws)).uniform() < rules.caption_dropout;
  document_ = {s, index, drop, outline(segments, vocabulary_, rules, drop), cursor_.draws};
  loaded_ = true;
  return document_;
}

void Draws::advance() {
  ++cursor_.taken[static_cast<size_t>(current().source)];
  ++cursor_.draws;
  loaded_ = false;
}

void Draws::move_to(DrawCursor cursor) {
  cursor_ = std::move(cursor);
  loaded_ = false;
}

}  // namespace moegraft::data
