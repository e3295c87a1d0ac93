// The block types of GGUF that can be read. Layouts: ggml's ggml-common.h; values to the last bit those of the gguf
// package (float32 products and sums, each rounded).
#include <cstring>

#include "moegraft/convert/gguf.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace moegraft::convert {
namespace {

float half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

void f32(const uint8_t* block, float* out) { std::memcpy(out, block, 4); }
void f16(const uint8_t* block, float* out) { *out = half(block); }
void bf16(const uint8_t* block, float* out) {
  const uint8_t bytes[4] = {0, 0, block[0], block[1]};
  std::memcpy(out, bytes, 4);
}

// 32 values: d [, m], 4 low bits of value i and i + 16 in byte i; fifth bits in a u32 before them; q - offset times d,
// or q d + m.
void q4_0(const uint8_t* b, float* out) {
  const float d = half(b);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * float((b[2 + i] & 15) - 8);
    out[i + 16] = d * float((b[2 + i] >> 4) - 8);
  }
}
void q4_1(const uint8_t* b, float* out) {
  const float d = half(b), m = half(b + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * float(b[4 + i] & 15) + m;
    out[i + 16] = d * float(b[4 + i] >> 4) + m;
  }
}
struct FifthBits {
  uint32_t bits;
  explicit FifthBits(const uint8_t* p) { std::memcpy(&bits, p, 4); }
  int of(int i) const { return int(bits >> i & 1) << 4; }
};
void q5_0(const uint8_t* b, float* out) {
  const float d = half(b);
  const FifthBits high(b + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * float(((b[6 + i] & 15) | high.of(i)) - 16);
    out[i + 16] = d * float(((b[6 + i] >> 4) | high.of(i + 16)) - 16);
  }
}
void q5_1(const uint8_t* b, float* out) {
  const float d = half(b), m = half(b + 2);
  const FifthBits high(b + 4);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * float((b[8 + i] & 15) | high.of(i)) + m;
    out[i + 16] = d * float((b[8 + i] >> 4) | high.of(i + 16)) + m;
  }
}
void q8_0(const uint8_t* b, float* out) {
  const float d = half(b);
  for (int i = 0; i < 32; ++i) out[i] = d * float(int8_t(b[2 + i]));
}

// 256 values in 8 groups of 32, each with a scale and a minimum of 6 bits, packed in 12 bytes.
struct Scales6 {
  const uint8_t* p;
  int scale(int j) const { return j < 4 ? p[j] & 63 : (p[j + 4] & 15) | (p[j - 4] >> 6) << 4; }
  int minimum(int j) const { return j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | (p[j] >> 6) << 4; }
};
// Low 4 bits at `low`, and a fifth bit per value where `high` is given.
void q45_k(const uint8_t* b, const uint8_t* low, const uint8_t* high, float* out) {
  const float d = half(b), dmin = half(b + 2);
  const Scales6 scales{b + 4};
  for (int group = 0; group < 8; ++group) {
    const float scale = d * float(scales.scale(group)), minimum = dmin * float(scales.minimum(group));
    const uint8_t* q = low + group / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int nibble = group % 2 ? q[i] >> 4 : q[i] & 15, fifth = high ? (high[i] >> group & 1) << 4 : 0;
      out[group * 32 + i] = scale * float(nibble | fifth) - minimum;
    }
  }
}
void q4_k(const uint8_t* b, float* out) { q45_k(b, b + 16, nullptr, out); }
void q5_k(const uint8_t* b, float* out) { q45_k(b, b + 48, b + 16, out); }
// 256 values in 16 groups of 16 with a signed scale each: 4 low bits, 2 high bits, scales, d.
void q6_k(const uint8_t* b, float* out) {
  const uint8_t *low = b, *high = b + 128, *scales = b + 192;
  const float d = half(b + 208);
  for (int i = 0; i < 256; ++i) {
    const int part = i / 128, quarter = i % 128 / 32, at = i % 32;  // quarters of a half share its bytes
    const uint8_t l = low[part * 64 + quarter % 2 * 32 + at];
    const int q = (quarter < 2 ? l & 15 : l >> 4) | (high[part * 32 + at] >> 2 * quarter & 3) << 4;
    out[i] = d * float(int8_t(scales[i / 16])) * float(q - 32);
  }
}

}  // namespace

const std::vector<GgufType>& gguf_types() {
  static const std::vector<GgufType> table{
      {0, "F32", 1, 4, f32},        {1, "F16", 1, 2, f16},        {30, "BF16", 1, 2, bf16},
      {8, "Q8_0", 32, 34, q8_0},    {2, "Q4_0", 32, 18, q4_0},    {3, "Q4_1", 32, 20, q4_1},
      {6, "Q5_0", 32, 22, q5_0},    {7, "Q5_1", 32, 24, q5_1},    {12, "Q4_K", 256, 144, q4_k},
      {13, "Q5_K", 256, 176, q5_k}, {14, "Q6_K", 256, 210, q6_k},
  };
  return table;
}

}  // namespace moegraft::convert
