#pragma once
// The Python of the references (transformers, PEFT, …): tests that need it skip where it is not installed.

#include <string>

#include "support/process.h"

namespace moegraft::testing {

// Path of a Python that imports `modules` (comma separated); empty when there is none.
inline std::string reference_python(const std::string& source_dir, const std::string& modules) {
  for (const std::string& python : {source_dir + "/.venv/bin/python", std::string("/usr/bin/python3")}) {
    if (!std::filesystem::exists(python)) continue;
    if (Process({python, "-c", "import " + modules}).wait().code == 0) return python;
  }
  return {};
}

}  // namespace moegraft::testing
