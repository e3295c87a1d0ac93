#pragma once
// Captions that no training manifest holds: what shows whether a model understands or remembers.

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "emoji/emoji.h"

namespace moegraft::emoji {

std::set<std::string> word_set(const std::string& text);  // words_of(), each once
bool shares_word(const std::string& text, const std::set<std::string>& words);

// Other words for a picture, by its name. UserError: a line that is not "name<TAB>other words", a name that comes
// twice, a synonym that shares a word with its name.
std::map<std::string, std::string> read_synonyms(const std::filesystem::path& file);

// Up to two keywords, none of whose words is in the name: those of one in three names (by seed). Words that other
// entries of `uses` have come first (they can be learnt there), then rare ones. Empty: this name has no paraphrase.
std::vector<std::string> paraphrase(const EmojiEntry& entry, const std::map<std::string, int64_t>& uses, uint64_t seed);

// In how many entries each keyword comes.
std::map<std::string, int64_t> count_keywords(const std::vector<EmojiEntry>& entries);

// The name in a sentence of a form that emoji_captions() does not make; `index` chooses among a few.
std::string in_new_sentence(const std::string& name, int64_t index);

}  // namespace moegraft::emoji
