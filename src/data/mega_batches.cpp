#include "data/mega_batches.h"

#include <algorithm>
#include <map>

#include "moegraft/base/rng.h"

namespace moegraft::data {
namespace {

using Group = std::vector<const Document*>;

class GroupFeed : public DocumentFeed {
 public:
  GroupFeed(const Group& group, DocumentFeed* listener) : group_(group), listener_(listener) {}
  const Document* current() override { return at_ < group_.size() ? group_[at_] : nullptr; }
  void advance() override { ++at_; }
  void on_truncated(const Document& document) override {
    if (listener_) listener_->on_truncated(document);
  }
  void on_skipped(const Document& document) override {
    if (listener_) listener_->on_skipped(document);
  }

 private:
  const Group& group_;
  DocumentFeed* listener_;
  size_t at_ = 0;
};

std::vector<std::vector<PlannedSequence>> cut(const Group& group, Packer packer, int64_t budget,
                                              DocumentFeed* listener) {
  packer.budget = budget;
  GroupFeed feed(group, listener);
  std::vector<std::vector<PlannedSequence>> out;
  int64_t offset = 0;
  while (feed.current() != nullptr)
    if (auto sequences = packer.fill(feed, offset); !sequences.empty()) out.push_back(std::move(sequences));
  return out;
}

// The smallest budget that makes no more mega-batches than packer.budget does.
int64_t even_budget(const Group& group, const Packer& packer) {
  const auto full = cut(group, packer, packer.budget, nullptr);
  if (full.empty()) return packer.budget;
  int64_t tokens = 0;
  for (const auto& batch : full)
    for (const auto& sequence : batch) tokens += sequence.tokens;
  const auto count = static_cast<int64_t>(full.size());
  int64_t low = std::max((tokens + count - 1) / count, std::min(packer.sequence_length, packer.budget));
  // What a mega-batch leaves free is less than a sequence, so this much is enough.
  int64_t high = std::min(low + packer.sequence_length, packer.budget);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(cut(group, packer, middle, nullptr).size()) <= count)
      high = middle;
    else
      low = middle + 1;
  }
  if (packer.stream)
    high =
        std::min((high + packer.sequence_length - 1) / packer.sequence_length * packer.sequence_length, packer.budget);
  return high;
}

}  // namespace

std::vector<std::vector<PlannedSequence>> cut_mega_batches(const std::vector<Document>& documents, const Packer& packer,
                                                           uint64_t seed, int64_t window, DocumentFeed& listener) {
  std::map<uint64_t, Group> groups;
  for (const auto& document : documents) groups[document.outline.modalities].push_back(&document);
  std::vector<std::vector<PlannedSequence>> in_order, shuffled;
  for (auto& [modalities, group] : groups) {
    std::stable_sort(group.begin(), group.end(), [](const Document* a, const Document* b) {
      return a->outline.stored_size < b->outline.stored_size;
    });
    for (auto& batch : cut(group, packer, even_budget(group, packer), &listener)) in_order.push_back(std::move(batch));
  }
  for (const int64_t at :
       Rng(seed, "data.mega_batch", static_cast<uint64_t>(window)).permutation(static_cast<int64_t>(in_order.size())))
    shuffled.push_back(std::move(in_order[static_cast<size_t>(at)]));
  return shuffled;
}

}  // namespace moegraft::data
