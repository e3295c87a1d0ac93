#pragma once
// Small string helpers for messages and keys.

#include <string>
#include <string_view>
#include <vector>

namespace moegraft {

// The candidate with the smallest edit distance to `word`; empty when none is close enough to be a typo.
std::string nearest_word(std::string_view word, const std::vector<std::string>& candidates);
std::string join(const std::vector<std::string>& words, std::string_view separator);
std::vector<std::string> split(std::string_view text, char separator);
std::string trim(std::string_view text);

}  // namespace moegraft
