#include "device_run.cuh"
#include "loss_kernels.h"
#include "route_kernels.h"
#include "routing_kernels.h"

namespace moegraft::kernels::cuda {

MOEGRAFT_ROWS(RouteForward);
MOEGRAFT_ROWS(RouteBackward);
MOEGRAFT_ROWS(RoutingPartial);
MOEGRAFT_THREADS(AddRoutingPartials);
MOEGRAFT_ROWS(CrossEntropyRow<float, float>);
MOEGRAFT_ROWS(CrossEntropyRow<float, bf16>);
MOEGRAFT_ROWS(CrossEntropyRow<bf16, float>);
MOEGRAFT_ROWS(CrossEntropyRow<bf16, bf16>);

}  // namespace moegraft::kernels::cuda
