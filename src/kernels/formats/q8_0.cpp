// GGUF's Q8_0 (ggml-common.h): 32 integers and a float16 scale d = max |x| / 127; x = d q. A group of `width` rows is
// width scales, then 32 x width integers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../cpu/block_product.h"
#include "formats.h"

namespace moegraft::kernels {
namespace {

constexpr int64_t kBlock = format_row(WeightFormat::q8_0).block;

// As ggml's quantize_row_q8_0_ref: integers by the unrounded scale, halves away from zero.
bool store(const float* block, int64_t column, int64_t width, uint8_t* group) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < kBlock; ++i)
    largest = std::max(largest, std::fabs(block[i])), finite &= std::isfinite(block[i]);
  const float d = largest / 127.0f, inverse = d >= std::numeric_limits<float>::min() ? 1.0f / d : 0.0f;
  const at::Half scale(d);
  if (!finite || !std::isfinite(float(scale))) return false;
  std::memcpy(group + 2 * column, &scale, 2);
  auto* q = reinterpret_cast<int8_t*>(group + 2 * width) + column;
  for (int64_t i = 0; i < kBlock; ++i) q[i * width] = int8_t(std::round(block[i] * inverse));
  return true;
}

void load(const uint8_t* group, int64_t column, int64_t width, float* block) {
  at::Half scale;
  std::memcpy(&scale, group + 2 * column, 2);
  const auto* q = reinterpret_cast<const int8_t*>(group + 2 * width) + column;
  for (int64_t i = 0; i < kBlock; ++i) block[i] = float(q[i * width]) * float(scale);
}

template <class T>
void to(const uint8_t* panel, int64_t width, int64_t first, int64_t k, T* out) {
  const int64_t bytes = kQ8_0.group_bytes(width);
  for (int64_t at = first; at < first + k;) {
    const int64_t begin = at % kBlock, count = std::min(kBlock - begin, first + k - at);
    const uint8_t* group = panel + at / kBlock * bytes;
    loops<T>().dequantise_q8_0(group, reinterpret_cast<const int8_t*>(group + 2 * width) + begin * width, width, count,
                               out);
    out += count * width, at += count;
  }
}

}  // namespace

const BlockFormat kQ8_0{WeightFormat::q8_0, store, load, to<float>, to<bf16>};

}  // namespace moegraft::kernels
