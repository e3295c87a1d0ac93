#pragma once
#include <string>
#include <string_view>

namespace moegraft::data {

std::u32string to_code_points(std::string_view utf8);  // invalid bytes become U+FFFD
std::string to_utf8(std::u32string_view code_points);
// Lower case, curly quotes to straight ones, runs of white space to one blank, trimmed.
std::string plain_lower(std::string_view utf8);

}  // namespace moegraft::data
