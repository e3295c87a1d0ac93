#include "moegraft/kernels/device_numerics.h"

#include <ATen/Context.h>

#include "libtorch.h"

namespace moegraft::kernels {

void set_device_numerics() {
  at::Context& library = at::globalContext();
  // A product cut along its contraction adds its parts: in float32, not in bf16. The head's gradient contracts over the
  // whole vocabulary. Cutting itself stays allowed.
  library.setAllowBF16ReductionCuBLAS(false, /*allow_splitk=*/true);
  // TF32 keeps 10 bits of a float32's 23. For convolutions it is on by default, and would move a codec's codes; for
  // products it is off unless the environment says otherwise, and the router's ties are why it must stay so.
  library.setAllowTF32CuDNN(false);
  library.setAllowTF32CuBLAS(false);
  // Of convolutions' gradients the library may choose a form with float atomics, or by timing.
  library.setDeterministicCuDNN(true);
  library.setBenchmarkCuDNN(false);
}

}  // namespace moegraft::kernels
