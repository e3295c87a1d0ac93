#include "data/packer.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::data {
namespace {

void append(PlannedSequence& to, const Document& document, int64_t begin, int64_t count) {
  const Outline& all = document.outline;
  to.pieces.push_back({document.source, document.index, begin, count, document.drop_caption, document.draw});
  to.tokens += count;
  to.modalities |= all.modalities;
  to.new_tokens += all.new_tokens;  // cut: text alone
  // Of text alone every token but the first is predicted, by the one before it.
  to.labels += all.text_only ? std::max<int64_t>(std::min(begin + count, all.size - 1) - begin, 0) : all.num_labels;
}

}  // namespace

std::vector<PlannedSequence> Packer::fill(DocumentFeed& feed, int64_t& offset) const {
  std::vector<PlannedSequence> sequences;
  PlannedSequence open;
  int64_t room = budget;
  while (room > 0) {
    const Document* document = feed.current();
    if (document == nullptr) break;
    const int64_t size = document->outline.size;
    const bool text_only = document->outline.text_only;
    if (stream && text_only) {
      const int64_t count = std::min({size - offset, sequence_length - open.tokens, room});
      append(open, *document, offset, count);
      room -= count;
      offset += count;
      if (offset == size) {
        feed.advance();
        offset = 0;
      }
      if (open.tokens == sequence_length) {
        sequences.push_back(std::move(open));
        open = {};
      }
      continue;
    }
    if (size > sequence_length && !text_only) {
      feed.on_skipped(*document);
      feed.advance();
      continue;
    }
    const int64_t count = std::min(size, sequence_length);
    if (count > room) break;
    append(sequences.emplace_back(), *document, 0, count);
    if (count < size) feed.on_truncated(*document);
    room -= count;
    feed.advance();
  }
  if (open.tokens > 0) sequences.push_back(std::move(open));
  return sequences;
}

Sequence Assembler::make(const PlannedSequence& planned) {
  Sequence out;
  for (const Piece& piece : planned.pieces) {
    if (piece.source != kept_.source || piece.index != kept_.index || piece.draw != kept_.draw) {
      const auto source = static_cast<size_t>(piece.source);
      document_ = assemble(sources_[source].document(piece.index), vocabulary_, rules_[source], piece.drop_caption);
      const auto add_noise = [&](const char* key, double share, auto replace) {
        if (share == 0) return;
        Rng rng(seed_, key, static_cast<uint64_t>(piece.draw));
        replace(document_, vocabulary_, share, rng);
      };
      add_noise("data.caption_noise", rules_[source].caption_noise, replace_caption);
      add_noise("data.code_noise", rules_[source].code_noise, replace_codes);
      kept_ = piece;
    }
    MOEGRAFT_INVARIANT(piece.begin + piece.count <= document_.size(), "a piece ends at token ",
                       piece.begin + piece.count, " of a document of ", document_.size());
    const auto copy = [&](std::vector<int64_t>& to, const std::vector<int64_t>& from) {
      to.insert(to.end(), from.begin() + piece.begin, from.begin() + piece.begin + piece.count);
    };
    copy(out.ids, document_.ids);
    copy(out.modality, document_.modality);
    copy(out.labels, document_.labels);
    out.text_only &= document_.text_only;
  }
  return out;
}

}  // namespace moegraft::data
