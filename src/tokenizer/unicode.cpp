#include "unicode.h"

#include <utf8proc.h>

#include <cstdlib>

#include "moegraft/base/check.h"

namespace moegraft::tokenizer {

namespace {

// Length of the well-formed character at the start of `text`, or 0; `bad` receives the length of the maximal ill-formed
// part (Unicode 3.9, table 3-7).
size_t well_formed(std::string_view text, size_t& bad) {
  const auto at = [&](size_t i) -> unsigned { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned a = at(0);
  bad = 1;
  if (a < 0x80) return 1;
  unsigned low = 0x80, high = 0xBF;
  size_t length = 0;
  if (a >= 0xC2 && a <= 0xDF)
    length = 2;
  else if (a >= 0xE0 && a <= 0xEF)
    length = 3, low = a == 0xE0 ? 0xA0 : 0x80, high = a == 0xED ? 0x9F : 0xBF;
  else if (a >= 0xF0 && a <= 0xF4)
    length = 4, low = a == 0xF0 ? 0x90 : 0x80, high = a == 0xF4 ? 0x8F : 0xBF;
  else
    return 0;
  for (size_t i = 1; i < length; ++i) {
    if (at(i) < low || at(i) > high) return 0;
    low = 0x80, high = 0xBF;
    bad = i + 1;
  }
  return length;
}

std::string decompose(std::string_view text, int options) {
  std::vector<int32_t> points(text.size() + 16);
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  const auto flags = static_cast<utf8proc_option_t>(options);
  auto needed = utf8proc_decompose(bytes, static_cast<utf8proc_ssize_t>(text.size()), points.data(),
                                   static_cast<utf8proc_ssize_t>(points.size()), flags);
  if (needed > static_cast<utf8proc_ssize_t>(points.size())) {
    points.resize(static_cast<size_t>(needed));
    needed = utf8proc_decompose(bytes, static_cast<utf8proc_ssize_t>(text.size()), points.data(), needed, flags);
  }
  MOEGRAFT_CHECK(needed >= 0, "Unicode normalisation failed: ", utf8proc_errmsg(needed));
  const auto count = utf8proc_normalize_utf32(points.data(), needed, flags);
  MOEGRAFT_CHECK(count >= 0, "Unicode normalisation failed: ", utf8proc_errmsg(count));
  std::string out;
  out.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < count; ++i) append_utf8(out, points[static_cast<size_t>(i)]);
  return out;
}

bool is_ascii(std::string_view text) {
  for (const char c : text) {
    if (static_cast<unsigned char>(c) >= 0x80) return false;
  }
  return true;
}

}  // namespace

bool is_valid_utf8(std::string_view text) {
  size_t bad = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t length = well_formed(text.substr(i), bad);
    if (!length) return false;
    i += length;
  }
  return true;
}

std::string valid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  size_t bad = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t length = well_formed(text.substr(i), bad);
    if (length)
      out += text.substr(i, length);
    else
      out += "\xEF\xBF\xBD";
    i += length ? length : bad;
  }
  return out;
}

int32_t next_code_point(std::string_view text, size_t& offset) {
  const auto byte = [&](size_t i) { return static_cast<int32_t>(static_cast<unsigned char>(text[i])); };
  const int32_t lead = byte(offset);
  const size_t length = utf8_length(static_cast<unsigned char>(lead));
  int32_t c = length == 1 ? lead : lead & (0x7F >> length);
  if (length > text.size() - offset) {  // cut inside a character
    offset = text.size();
    return 0xFFFD;
  }
  for (size_t i = 1; i < length; ++i) c = (c << 6) | (byte(offset + i) & 0x3F);
  offset += length;
  return c;
}

void append_utf8(std::string& text, int32_t c) {
  utf8proc_uint8_t bytes[4];
  const auto length = utf8proc_encode_char(c, bytes);
  text.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(length));
}

std::string normalize(std::string_view text, NormalForm form) {
  if (is_ascii(text)) return std::string(text);
  int options = form == NormalForm::nfc || form == NormalForm::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == NormalForm::nfkc || form == NormalForm::nfkd) options |= UTF8PROC_COMPAT;
  return decompose(text, options | UTF8PROC_STABLE);
}

std::string lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const int32_t c = next_code_point(text, i);
    if (c == 0x130)
      out += "i\xCC\x87";  // the one character whose unconditional lower case is two
    else
      append_utf8(out, utf8proc_tolower(c));
  }
  return out;
}

std::string strip_accents(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    const auto category = utf8proc_category(next_code_point(text, i));
    const bool mark =
        category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_MC || category == UTF8PROC_CATEGORY_ME;
    if (!mark) out += text.substr(start, i - start);
  }
  return out;
}

bool is_white_space(int32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_numeric(int32_t c) {
  const auto category = utf8proc_category(c);
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO;
}

bool is_punctuation(int32_t c) {
  if (c < 0x80)
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
  const auto category = utf8proc_category(c);
  return category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO;
}

}  // namespace moegraft::tokenizer
