#include "moegraft/data/unicode.h"

#include <utf8proc.h>

#include "moegraft/base/text.h"

namespace moegraft::data {

std::u32string to_code_points(std::string_view utf8) {
  std::u32string out;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(utf8.data());
  for (size_t i = 0; i < utf8.size();) {
    utf8proc_int32_t c = -1;
    const auto used = utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(utf8.size() - i), &c);
    out.push_back(used > 0 ? static_cast<char32_t>(c) : U'\uFFFD');
    i += used > 0 ? static_cast<size_t>(used) : 1;
  }
  return out;
}

std::string to_utf8(std::u32string_view code_points) {
  std::string out;
  for (char32_t c : code_points) {
    utf8proc_uint8_t bytes[4];
    const auto size = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes);
    out.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(size));
  }
  return out;
}

std::string plain_lower(std::string_view utf8) {
  std::u32string out;
  for (char32_t c : to_code_points(utf8)) {
    if (c == U'’' || c == U'‘') c = U'\'';
    if (c == U'“' || c == U'”') c = U'"';
    const bool space = c == U' ' || c == U'\t' || c == U'\n' || c == U'\r' || c == U'\u00a0';
    if (space && (out.empty() || out.back() == U' ')) continue;
    out.push_back(space ? U' ' : static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
  }
  while (!out.empty() && out.back() == U' ') out.pop_back();
  return to_utf8(out);
}

}  // namespace moegraft::data
