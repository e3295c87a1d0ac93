#include "formats.h"

namespace moegraft::kernels {

const BlockFormat* block_format(WeightFormat format) {
  for (const BlockFormat* f : {&kQ8_0})
    if (f->format == format) return f;
  return nullptr;
}

}  // namespace moegraft::kernels
