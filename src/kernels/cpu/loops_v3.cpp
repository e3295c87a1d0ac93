// The loops for what the whole program requires anyway (CMake: MOEGRAFT_MARCH).
#define MOEGRAFT_LOOPS v3
#include "loops.inc"
