#pragma once
// The CPU path of a test program, and of the moegraft that it starts (moegraft_command): --cpu-path=avx2 beside gtest's
// options. tests/CMakeLists.txt runs the promises on every path so.

#include <cstdlib>
#include <iostream>
#include <string>

#include "moegraft/base/check.h"
#include "moegraft/kernels/cpu.h"

namespace moegraft::testing {

// Takes the option out of the arguments. Ends the program where this machine has no such path.
inline void take_cpu_path(int& argc, char** argv) {
  const std::string option = "--cpu-path=";
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (!argument.starts_with(option)) {
      argv[kept++] = argv[i];
      continue;
    }
    try {
      kernels::allow_cpu_path(argument.substr(option.size()), "--cpu-path");
    } catch (const UserError& e) {
      std::cerr << e.what() << '\n';
      std::exit(2);
    }
  }
  argv[argc = kept] = nullptr;
}

}  // namespace moegraft::testing
