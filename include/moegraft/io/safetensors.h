#pragma once
// The safetensors format: u64 header size, JSON header, raw little-endian data. Reading maps the file; tensors are
// zero-copy views that keep the mapping alive. Every size is checked before it is used.

#include <torch/types.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moegraft/io/read_ahead.h"

namespace moegraft::io {

using TensorMap = std::map<std::string, at::Tensor>;

class SafetensorsFile {
 public:
  // Maps and validates the header. Throws UserError naming the file: missing, truncated, overlapping or misaligned
  // ranges, unknown dtype.
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const;
  std::vector<std::string> names() const;
  bool contains(const std::string& name) const;
  at::Tensor tensor(const std::string& name)
      const;  // zero-copy (see is_view), read-only by contract; UserError when absent (nearest name given)
  bool is_view(const std::string& name) const;  // false: the file does not align it, so tensor() copies
  // Gives the memory of a view's pages back; the next read brings them in again from the file (or the kernel's page
  // cache). For tensors that are used seldom or have been copied. False, and nothing done, when the tensor does not lie
  // in this file's mapping. Safe beside readers.
  bool release_pages(const at::Tensor& view) const;
  bool holds(const at::Tensor& view) const;        // whether its memory is this mapping
  FileRange range(const std::string& name) const;  // where its bytes lie
  std::vector<int64_t> shape(const std::string& name) const;
  at::ScalarType dtype(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const;

 private:
  struct Mapping;
  std::shared_ptr<const Mapping> mapping_;
};

// Reads every tensor (zero-copy views).
TensorMap load_safetensors(const std::filesystem::path& path);

// Writes to a temporary name, fsyncs, renames. Tensors are copied to the CPU and made contiguous. Throws UserError on a
// full disk; the old file stays.
void save_safetensors(const std::filesystem::path& path, const TensorMap& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace moegraft::io
