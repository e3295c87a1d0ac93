#include "moegraft/codec/code_shape.h"

#include <charconv>

#include "moegraft/base/text.h"

namespace moegraft::codec {

int64_t CodeShape::num_positions() const {
  int64_t product = 1;
  for (const int64_t extent : positions) product *= extent;
  return product;
}

std::string format_positions(const std::vector<int64_t>& positions) {
  std::string text;
  for (const int64_t extent : positions) text += (text.empty() ? "" : "x") + std::to_string(extent);
  return text;
}

std::vector<int64_t> parse_positions(const std::string& text) {
  std::vector<int64_t> positions;
  int64_t product = 1;
  for (const auto& part : split(text, 'x')) {
    int64_t extent = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), extent);
    if (error != std::errc() || end != part.data() + part.size() || extent < 1 || extent > INT32_MAX / product)
      return {};
    positions.push_back(extent);
    product *= extent;
  }
  return positions;
}

}  // namespace moegraft::codec
