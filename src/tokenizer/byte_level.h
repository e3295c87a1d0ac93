#pragma once
// GPT-2's byte alphabet: every byte has a printable character. Printable Latin-1 bytes stand for themselves, the others
// take U+0100, U+0101, … in order.

#include <cstdint>
#include <string>
#include <string_view>

namespace moegraft::tokenizer {

std::string bytes_to_chars(std::string_view bytes);
// The byte of a character, or -1.
int byte_of_char(int32_t code_point);

}  // namespace moegraft::tokenizer
