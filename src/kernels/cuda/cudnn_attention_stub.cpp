// Linked where CUDA is off.

#include "cudnn_attention.h"

namespace moegraft::kernels {

int64_t cudnn_attention_version() { return -1; }

}  // namespace moegraft::kernels
