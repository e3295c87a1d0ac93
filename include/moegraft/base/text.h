#pragma once
// Small string helpers for messages and keys.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moegraft {

// The candidate with the smallest edit distance to `word`; empty when none is close enough to be a typo.
std::string nearest_word(std::string_view word, const std::vector<std::string>& candidates);
std::string join(const std::vector<std::string>& words, std::string_view separator);
std::vector<std::string> split(std::string_view text, char separator);
std::string trim(std::string_view text);
std::string lower_case(std::string_view text);  // of ASCII letters; the rest stays
// Words in their order: runs of ASCII letters and digits in lower case, and of all that is not ASCII ("jack-o-lantern"
// has three).
std::vector<std::string> words_of(std::string_view text);
// Control characters as \n, \t or \xNN: names out of files cannot break a line or colour a terminal.
std::string printable(std::string_view text);
// printable(), cut in the middle to about `most` bytes at whole characters: values out of files in error texts.
std::string shortened(std::string_view text, size_t most = 100);
// How deep brackets of a JSON text nest, strings aside. Parsers and printers of values recurse: what is deeper than
// kMostJsonDepth is refused first.
int64_t json_depth(std::string_view text);
constexpr int64_t kMostJsonDepth = 100;

}  // namespace moegraft
