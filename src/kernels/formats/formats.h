#pragma once
// What a quantised format does. A matrix W [N, K] lies in panels of 64 rows of W (the last one of padded_width,
// block_product.h), each a sequence of groups: 32 (the format's block) neighbouring columns of W for every row of the
// panel, so that a panel is read front to back. Padding dequantises to zero. One layout serves both passes and both
// compute dtypes.

#include <cstdint>

#include "../cpu/loops.h"
#include "moegraft/kernels/weight_format.h"

namespace moegraft::kernels {

struct BlockFormat {
  WeightFormat format;
  // A row's block of floats (all finite) as column `column` of a group of `width`; false: beyond the format's range.
  // And back.
  bool (*store)(const float* block, int64_t column, int64_t width, uint8_t* group);
  void (*load)(const uint8_t* group, int64_t column, int64_t width, float* block);
  // Columns [first, first + k) of W, from the panel's first group on, as rows of a panel that products read:
  // [k/pair][width][pair]; k and first whole pairs.
  void (*to_float)(const uint8_t* panel, int64_t width, int64_t first, int64_t k, float* out);
  void (*to_bf16)(const uint8_t* panel, int64_t width, int64_t first, int64_t k, bf16* out);

  const WeightFormatRow& row() const { return format_row(format); }
  int64_t groups(int64_t k) const { return (k + row().block - 1) / row().block; }
  int64_t group_bytes(int64_t width) const { return width * row().block_bytes; }
  void dequantise(const uint8_t* panel, int64_t width, int64_t first, int64_t k, float* out) const {
    to_float(panel, width, first, k, out);
  }
  void dequantise(const uint8_t* panel, int64_t width, int64_t first, int64_t k, bf16* out) const {
    to_bf16(panel, width, first, k, out);
  }
};

// Null for floating formats.
const BlockFormat* block_format(WeightFormat format);

extern const BlockFormat kQ8_0;

}  // namespace moegraft::kernels
