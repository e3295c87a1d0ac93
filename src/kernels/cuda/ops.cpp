// The leaf operations on the device (ops_stub.cpp where CUDA is off).

#ifdef MOEGRAFT_HAVE_CUDA

#include "device_run.h"
#include "ops_body.h"

namespace moegraft::kernels::cuda {

using Device = Ops<OnDevice>;

bool holds(const at::Tensor& x) { return x.is_cuda(); }

}  // namespace moegraft::kernels::cuda

#include "ops_exports.h"

#endif  // MOEGRAFT_HAVE_CUDA
