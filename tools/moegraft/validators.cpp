// Checks of option values.
#include <cmath>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::tools {
namespace {

CLI::Validator number_that(bool (*holds)(double), const char* what, const char* name) {
  return CLI::Validator(
      [holds, what](std::string& text) {
        double value = 0;
        const bool good = CLI::detail::lexical_cast(text, value) && std::isfinite(value) && holds(value);
        return good ? std::string() : detail::concat("must be a number, ", what, ", got ", shortened(text));
      },
      name);
}

}  // namespace

CLI::Validator positive() {
  return number_that([](double value) { return value > 0; }, "above 0", "POSITIVE");
}
CLI::Validator not_negative() {
  return number_that([](double value) { return value >= 0; }, "0 or more", "NONNEGATIVE");
}

}  // namespace moegraft::tools
