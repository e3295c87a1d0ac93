#pragma once
// A loaded base that trains.

#include "moegraft/model/weights.h"

namespace moegraft::model {

// The same base as float32 leaves on the CPU, as init_base makes them. `frozen` must be float32 and whole (every
// expert).
BaseModel thaw_base(const BaseModel& frozen);

}  // namespace moegraft::model
