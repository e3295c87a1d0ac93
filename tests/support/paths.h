#pragma once
// Where the tests' files lie: where the build was configured, or where environment variables of the same names say, so
// that a test program can be carried to another machine.

#include <cstdlib>
#include <string>

namespace moegraft {

inline std::string path_from_environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}
inline std::string test_source_dir() { return path_from_environment("MOEGRAFT_SOURCE_DIR", MOEGRAFT_SOURCE_DIR); }
inline std::string test_binary_dir() { return path_from_environment("MOEGRAFT_BINARY_DIR", MOEGRAFT_BINARY_DIR); }

}  // namespace moegraft
