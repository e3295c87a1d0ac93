// Linked where CUDA is off.

#include "../adamw8.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels::adamw8 {

void step_cuda(const Factors&, const Arrays&, int) {
  fail<UserError>(
      "train.optimizer: adamw_8bit on a GPU needs a build with -DMOEGRAFT_CUDA=ON; this one has none: take adamw, or "
      "the CPU");
}

}  // namespace moegraft::kernels::adamw8
