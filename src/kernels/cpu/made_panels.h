#pragma once

#include "../formats/formats.h"
#include "block_product.h"

namespace moegraft::kernels {

// Where panel j of the stored operand itself begins.
template <class T>
const void* stored_panel(const StoredOperand& s, int64_t j) {
  if (!s.format) return static_cast<const T*>(s.data) + j * kPanel * padded_depth<T>(s.k);
  return static_cast<const uint8_t*>(s.data) + j * s.format->groups(s.k) * s.format->group_bytes(kPanel);
}

void forget_made_panels();  // the thread begins another task: what its panels were made of may be gone

}  // namespace moegraft::kernels
