#include "byte_level.h"

#include <array>

#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

constexpr bool is_printable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct Tables {
  std::array<std::string, 256> chars;
  std::array<int, 0x200> bytes;
  Tables() {
    bytes.fill(-1);
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const int c = is_printable(byte) ? byte : next++;
      append_utf8(chars[static_cast<size_t>(byte)], c);
      bytes[static_cast<size_t>(c)] = byte;
    }
  }
};
const Tables& tables() {
  static const Tables t;
  return t;
}

}  // namespace

std::string bytes_to_chars(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() * 3 / 2);
  for (const char c : bytes) out += tables().chars[static_cast<unsigned char>(c)];
  return out;
}

int byte_of_char(int32_t c) { return c >= 0 && c < 0x200 ? tables().bytes[static_cast<size_t>(c)] : -1; }

}  // namespace moegraft::tokenizer
