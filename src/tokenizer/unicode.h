#pragma once
// UTF-8 and Unicode helpers over utf8proc.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moegraft::tokenizer {

// The text with every ill-formed sequence replaced by U+FFFD (one per maximal ill-formed part, as Python and Rust do).
std::string valid_utf8(std::string_view text);
bool is_valid_utf8(std::string_view text);

// One code point of valid UTF-8 at `offset`; advances offset.
int32_t next_code_point(std::string_view text, size_t& offset);
void append_utf8(std::string& text, int32_t code_point);
// Byte length of the character that starts with this byte of valid UTF-8.
inline size_t utf8_length(unsigned char lead) { return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

enum class NormalForm { nfc, nfd, nfkc, nfkd };
std::string normalize(std::string_view text, NormalForm form);
std::string lowercase(std::string_view text);      // full mapping, as Rust's str::to_lowercase per character
std::string strip_accents(std::string_view text);  // removes marks (category M)

bool is_white_space(int32_t c);  // property White_Space
bool is_numeric(int32_t c);      // Nd, Nl, No
bool is_punctuation(int32_t c);  // ASCII punctuation, or category P

}  // namespace moegraft::tokenizer
