// The loops for AVX-512 (CMake gives this file its own -march on x86-64; elsewhere it equals loops_v3.cpp and is not
// chosen).
#define MOEGRAFT_LOOPS v4
#include "loops.inc"
