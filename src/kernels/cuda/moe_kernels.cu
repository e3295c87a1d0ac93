#include "device_run.cuh"
#include "dispatch_kernels.h"
#include "row_kernels.h"
#include "sequence_kernels.h"
#include "swiglu_kernels.h"

namespace moegraft::kernels::cuda {

MOEGRAFT_THREADS(CountSlots);
MOEGRAFT_THREADS(PlaceSlots);
MOEGRAFT_THREADS(BucketOffsets);
MOEGRAFT_THREADS(SequenceOffsets);
MOEGRAFT_THREADS(SlotsToRows);
MOEGRAFT_THREADS(RowsToSlots);
MOEGRAFT_THREADS(RowBits);
MOEGRAFT_THREADS(GateThin<float>);
MOEGRAFT_THREADS(GateThin<bf16>);

#define MOEGRAFT_FACTOR_KERNELS(TFrom, TTo)        \
  MOEGRAFT_THREADS(FactorGradient<TFrom, TTo, 1>); \
  MOEGRAFT_THREADS(FactorGradient<TFrom, TTo, 8>)

MOEGRAFT_FACTOR_KERNELS(float, float);
MOEGRAFT_FACTOR_KERNELS(bf16, float);
MOEGRAFT_FACTOR_KERNELS(bf16, bf16);

#define MOEGRAFT_ROW_KERNELS(T, V)       \
  MOEGRAFT_THREADS(GatherRows<T, V>);    \
  MOEGRAFT_THREADS(AddRows<T, V>);       \
  MOEGRAFT_THREADS(CombineRows<T, V>);   \
  MOEGRAFT_THREADS(SwigluForward<T, V>); \
  MOEGRAFT_ROWS(SwigluBackward<T, V>)

MOEGRAFT_ROW_KERNELS(float, 1);
MOEGRAFT_ROW_KERNELS(float, 8);
MOEGRAFT_ROW_KERNELS(bf16, 1);
MOEGRAFT_ROW_KERNELS(bf16, 8);

}  // namespace moegraft::kernels::cuda
