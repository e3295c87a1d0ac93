#pragma once
// How the codes of one item lie: where its positions are, and how many codebooks have a code at each of them.
//
// An item is one row of codes, position after position (a grid row by row), and at each position one code of every
// codebook, the first codebook's first: two codebooks a and b over three positions are a0 b0 a1 b1 a2 b2. This is
// MusicGen's flattening pattern (arXiv:2306.05284, sec. 2.2), the one of its patterns that needs one token a step and
// loses no dependence between codebooks. Place i of an item belongs to codebook i % codebooks. Codebooks share no ids:
// entry k of codebook c is code c * N + k of [0, codebooks * N), so each has a vocabulary row of its own and a code
// says which codebook it is of. All codebooks of a codec have N entries.

#include <cstdint>
#include <string>
#include <vector>

namespace moegraft::codec {

struct CodeShape {
  std::vector<int64_t> positions;  // {rows, columns} of a grid, {length} of a sequence
  int64_t codebooks = 1;           // codes at each position

  int64_t num_positions() const;
  int64_t item_length() const { return num_positions() * codebooks; }  // codes of one item
  bool operator==(const CodeShape&) const = default;
};

// "6x4", "75". parse_positions: empty when the text is no list of numbers of at least 1, or their product is beyond
// 2^31.
std::string format_positions(const std::vector<int64_t>& positions);
std::vector<int64_t> parse_positions(const std::string& text);

}  // namespace moegraft::codec
