#pragma once
// A file that appears under its name only when complete: temporary name in the same folder, fsync, rename, fsync of the
// folder.

#include <cstddef>
#include <filesystem>

namespace moegraft::io {

class AtomicFile {
 public:
  // Creates the temporary file. UserError: with the final path and the system's reason.
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();  // without commit(): removes the temporary file, the old file stays
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();

 private:
  [[noreturn]] void fail_errno(const char* what) const;
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
};

}  // namespace moegraft::io
