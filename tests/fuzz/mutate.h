#pragma once
// Damaged and hostile variants of a good file: bytes changed, cut, doubled and spliced, and what breaks parsers of JSON
// and YAML put between.

#include <algorithm>
#include <string>
#include <vector>

#include "moegraft/base/rng.h"

namespace moegraft::fuzz {

inline std::string mutate(const std::vector<std::string>& seeds, Rng& rng) {
  static const std::vector<std::string> tokens{"null",
                                               "-1",
                                               "0",
                                               "1e999",
                                               "-1e999",
                                               "99999999999999999999",
                                               "9223372036854775807",
                                               "-9223372036854775808",
                                               "1e-400",
                                               "true",
                                               "\"\"",
                                               "{}",
                                               "[]",
                                               "{\"",
                                               "\"\\ud83d\"",
                                               "\"\\u0000\"",
                                               "\xff\xfe",
                                               "\xEF\xBB\xBF",
                                               "\xF0\x9F",
                                               "[[[[[[[[",
                                               std::string(3000, '['),
                                               std::string(3000, '{'),
                                               "\n",
                                               "\r\n",
                                               "\t",
                                               "\0\0\0\0\0\0\0\0",
                                               "\\",
                                               "../../../etc/passwd",
                                               "(?:a?){30}a{30}",
                                               "(a+)+$",
                                               "\\C",
                                               "(*UTF)",
                                               "[a",
                                               "{1,99999}",
                                               "&a [*a]",
                                               "!!python/object:os.system",
                                               "- - - -",
                                               "data_offsets",
                                               "\"ids\":",
                                               std::string(70000, 'x')};
  std::string text = seeds[rng.below(seeds.size())];
  const auto place = [&] { return text.empty() ? size_t{0} : size_t(rng.below(text.size())); };
  for (uint64_t n = 1 + rng.below(6); n > 0; --n) {
    const size_t at = place(),
                 length = std::min<size_t>(text.size() - at, 1 + rng.below(rng.below(4) == 0 ? 4096 : 24));
    switch (rng.below(9)) {
      case 0:
        if (!text.empty()) text[at] = char(rng.below(256));
        break;
      case 1:
        if (!text.empty()) text[at] = char(text[at] ^ (1 << rng.below(8)));
        break;
      case 2: text.resize(at); break;
      case 3: text.erase(at, length); break;
      case 4: text.insert(place(), text.substr(at, length)); break;
      case 5: {
        const std::string& other = seeds[rng.below(seeds.size())];
        if (!other.empty()) text.insert(at, other.substr(rng.below(other.size()), 1 + rng.below(64)));
        break;
      }
      case 6: text.insert(at, tokens[rng.below(tokens.size())]); break;
      case 7: text.replace(at, length, tokens[rng.below(tokens.size())]); break;
      default:  // a number becomes another
        if (const size_t digit = text.find_first_of("0123456789", at); digit != std::string::npos) {
          size_t end = digit;
          while (end < text.size() && end - digit < 20 && text[end] >= '0' && text[end] <= '9') ++end;
          text.replace(digit, end - digit, tokens[1 + rng.below(8)]);
        }
    }
  }
  return text;
}

}  // namespace moegraft::fuzz
