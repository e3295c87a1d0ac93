#pragma once
// A file that is cut while it is mapped makes reads end in SIGBUS. This names the file instead of dying without a word.

#include <cstddef>
#include <string>

namespace moegraft::io {

// Whoever maps a file says so. At most 4,096 at a time are kept; further ones are not named.
void note_mapping(const void* base, size_t bytes, const std::string& path);
void forget_mapping(const void* base);

// For main(): on SIGBUS inside a noted mapping writes one line with the file's name and ends the process with 1;
// elsewhere the signal takes its usual course.
void name_file_on_bus_error();

}  // namespace moegraft::io
