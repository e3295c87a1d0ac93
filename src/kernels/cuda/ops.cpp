// The leaf operations on the device (ops_stub.cpp where CUDA is off).

#ifdef MOEGRAFT_HAVE_CUDA

#include "device_run.h"
#include "ops_body.h"

namespace moegraft::kernels::cuda {

using Device = Ops<OnDevice>;

bool available() { return true; }
bool serves(const at::Tensor& x) { return x.is_cuda() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16); }

}  // namespace moegraft::kernels::cuda

#include "ops_exports.h"

#endif  // MOEGRAFT_HAVE_CUDA
