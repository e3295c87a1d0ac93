#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "emoji/emoji.h"

namespace moegraft::emoji {

enum class EmojiSplit { train, heldout, composition };

// One split per entry. Whole concepts are held out; of the concepts that stay, single combinations (skin tone ×
// gesture, colour × thing) are. Well-known ones always train. A concept's fate depends on its name and the seed alone,
// so a limit or a font does not move it.
std::vector<EmojiSplit> split_emoji(const std::vector<EmojiEntry>& entries, double holdout, uint64_t seed);

// Indices of the popular subset among training entries: well-known ones first, then by seed.
std::vector<int64_t> popular_emoji(const std::vector<EmojiEntry>& entries, const std::vector<EmojiSplit>& splits,
                                   int64_t count, uint64_t seed);

uint64_t hash_text(std::string_view text);  // FNV-1a

// Position in the list of well-known names, or -1.
int64_t well_known_rank(const std::string& name);

}  // namespace moegraft::emoji
