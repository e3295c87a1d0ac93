#pragma once
// data.batching modality: steps of one combination of modalities each.

#include <cstdint>
#include <vector>

#include "data/packer.h"

namespace moegraft::data {

// The steps of a window of drawn documents. Documents are grouped by the modalities they are stored with, sorted by
// their stored length (stable), and cut into mega-batches of at most packer.budget tokens, about even within a group:
// as many as cutting at the budget makes, but no small one at the end. Every document is in exactly one (packing
// stream: every token of it), the last of each group too. Then they are shuffled by Rng(seed, "data.mega_batch",
// window). listener hears of documents that are cut or skipped.
std::vector<std::vector<PlannedSequence>> cut_mega_batches(const std::vector<Document>& documents, const Packer& packer,
                                                           uint64_t seed, int64_t window, DocumentFeed& listener);

}  // namespace moegraft::data
