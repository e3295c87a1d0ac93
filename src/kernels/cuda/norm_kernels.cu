#include "device_run.cuh"
#include "norm_kernels.h"

namespace moegraft::kernels::cuda {

#define MOEGRAFT_NORM(TX, TW, TY, V)            \
  MOEGRAFT_ROWS(RmsNormForward<TX, TW, TY, V>); \
  MOEGRAFT_ROWS(RmsNormBackward<TX, TW, TY, V>)
#define MOEGRAFT_NORM_TYPES(TX, TY) \
  MOEGRAFT_NORM(TX, float, TY, 1);  \
  MOEGRAFT_NORM(TX, float, TY, 8);  \
  MOEGRAFT_NORM(TX, bf16, TY, 1);   \
  MOEGRAFT_NORM(TX, bf16, TY, 8);   \
  MOEGRAFT_THREADS(RmsNormWeightPartial<TX, TY>)

MOEGRAFT_NORM_TYPES(float, float);
MOEGRAFT_NORM_TYPES(float, bf16);
MOEGRAFT_NORM_TYPES(bf16, bf16);
MOEGRAFT_THREADS(SumChunks<float>);
MOEGRAFT_THREADS(SumChunks<bf16>);

MOEGRAFT_THREADS(Rotate<float, 1>);
MOEGRAFT_THREADS(Rotate<float, 8>);
MOEGRAFT_THREADS(Rotate<bf16, 1>);
MOEGRAFT_THREADS(Rotate<bf16, 8>);

}  // namespace moegraft::kernels::cuda
