// The loops for AVX-512 with bf16 conversions.
#define MOEGRAFT_LOOPS v4_bf16
#include "loops.inc"
