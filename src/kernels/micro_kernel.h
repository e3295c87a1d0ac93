#pragma once
// What the micro-kernels (amx.h, avx512.h) are given.

#include <cstdint>

namespace moegraft::kernels {

// One product of a sum: A [m, depth] times a panel (block_product.h).
template <class T>
struct PanelTerm {
  const T* a;
  int64_t lda;
  const T* panel;
  int64_t depth;
};

// Cache lines that a micro-kernel asks for beside its products, a few at a time: what is worked on next comes from memory at the pace of the products.
struct Range {
  const void* at = nullptr;
  int64_t bytes = 0;
};
struct Ahead {
  static constexpr int kMost = 3;
  Range of[kMost];
  int count = 0;
  void add(Range r) {
    if (r.bytes > 0 && count < kMost) of[count++] = r;
  }
};

}  // namespace moegraft::kernels
