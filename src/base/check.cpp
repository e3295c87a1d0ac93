#include "moegraft/base/check.h"

namespace moegraft::detail {

void throw_invariant(const char* file, int line, const char* condition, const std::string& message) {
  throw InvariantError(concat("internal error at ", file, ":", line, ": ", condition, " does not hold: ", message,
                              " (please report this)"));
}

}  // namespace moegraft::detail
