#pragma once
// How a weight's numbers are stored. Leaf header: a config's choices, memory plans and reports ask this table; what
// each format does is in src/kernels/formats/. docs/extend.md says how to add one.

#include <cstdint>
#include <span>

namespace moegraft::kernels {

enum class WeightFormat { float32, bfloat16, q8_0 };

struct WeightFormatRow {
  WeightFormat value;
  const char* name;
  int64_t block;  // neighbouring elements of a row that are stored together; 1: each by itself
  int64_t block_bytes;
  bool on_gpu;  // whether a GPU computes with it

  constexpr bool quantised() const { return block > 1; }
  // Of a matrix [rows, columns]; a row's last block is stored whole.
  constexpr int64_t bytes(int64_t rows, int64_t columns) const {
    return rows * ((columns + block - 1) / block) * block_bytes;
  }
};

inline constexpr WeightFormatRow kWeightFormats[] = {
    {WeightFormat::float32, "float32", 1, 4, true},
    {WeightFormat::bfloat16, "bfloat16", 1, 2, true},
    {WeightFormat::q8_0, "q8_0", 32, 34, false},  // GGUF's: 8-bit integers and a float16 scale
};
constexpr const WeightFormatRow& format_row(WeightFormat format) {
  size_t i = 0;
  while (kWeightFormats[i].value != format) ++i;
  return kWeightFormats[i];
}

}  // namespace moegraft::kernels
