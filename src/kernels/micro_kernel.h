#pragma once
// Cache lines that a micro-kernel asks for beside its products, a few at a time: what is worked on next comes from memory at the pace of the products.

#include <cstdint>

namespace moegraft::kernels {

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
