#include "data/packer.h"

#include <algorithm>

namespace moegraft::data {
namespace {

void append(Sequence& out, const Sequence& from, int64_t begin, int64_t count) {
  auto copy = [&](std::vector<int64_t>& to, const std::vector<int64_t>& values) { to.insert(to.end(), values.begin() + begin, values.begin() + begin + count); };
  copy(out.ids, from.ids);
  copy(out.modality, from.modality);
  copy(out.labels, from.labels);
}

}  // namespace

std::vector<Sequence> Packer::fill(DocumentFeed& feed, int64_t& offset) const {
  std::vector<Sequence> sequences;
  Sequence open;
  int64_t room = budget;
  while (room > 0) {
    const Sequence* document = feed.current();
    if (document == nullptr) break;
    if (stream && document->text_only) {
      const int64_t count = std::min({document->size() - offset, sequence_length - open.size(), room});
      append(open, *document, offset, count);
      room -= count;
      offset += count;
      if (offset == document->size()) {
        feed.advance();
        offset = 0;
      }
      if (open.size() == sequence_length) {
        sequences.push_back(std::move(open));
        open = {};
      }
      continue;
    }
    if (document->size() > sequence_length && !document->text_only) {
      feed.on_skipped();
      feed.advance();
      continue;
    }
    const int64_t count = std::min(document->size(), sequence_length);
    if (count > room) break;
    sequences.emplace_back();
    sequences.back().text_only = document->text_only;
    append(sequences.back(), *document, 0, count);
    if (count < document->size()) feed.on_truncated();
    room -= count;
    feed.advance();
  }
  if (open.size() > 0) sequences.push_back(std::move(open));
  return sequences;
}

}  // namespace moegraft::data
