#pragma once
// GGUF, the model format of llama.cpp (versions 2 and 3, little-endian): u32 magic, u32 version, u64 tensors, u64 keys;
// keys with typed values; tensor names, sizes, types and offsets; then the data. Specification: ggml's docs/gguf.md.
// Every count is checked against the bytes that are left before it is used.

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace moegraft::convert {

// How 32 or 256 values lie in a block of bytes.
struct GgufType {
  uint32_t id;
  const char* name;
  int64_t block_values, block_bytes;
  void (*dequantize)(const uint8_t* block, float* out);  // one block to float32
};
const std::vector<GgufType>& gguf_types();  // those that can be read

class GgufFile {
 public:
  using Value = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>,
                             std::vector<std::string>>;

  // Reads keys and tensor names. UserError naming the file: not GGUF, truncated, an unknown version, a key or tensor
  // twice, sizes beyond the file.
  explicit GgufFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  bool has(const std::string& key) const { return values_.contains(key); }
  // UserError: the key is missing or of another type.
  int64_t integer(const std::string& key) const;
  int64_t integer(const std::string& key, int64_t fallback) const { return has(key) ? integer(key) : fallback; }
  double number(const std::string& key) const;
  double number(const std::string& key, double fallback) const { return has(key) ? number(key) : fallback; }
  bool boolean(const std::string& key, bool fallback) const;
  std::string string(const std::string& key) const;
  std::string string(const std::string& key, const std::string& fallback) const {
    return has(key) ? string(key) : fallback;
  }
  const std::vector<std::string>& strings(const std::string& key) const;
  std::vector<int64_t> integers(const std::string& key) const;
  std::vector<double> numbers(const std::string& key) const;

  bool contains(const std::string& tensor) const { return tensors_.contains(tensor); }
  std::vector<std::string> names() const;
  std::vector<int64_t> shape(const std::string& tensor) const;  // as PyTorch counts: rows first
  const GgufType& type(const std::string& tensor) const;  // UserError: a type that cannot be read, with those that can
  at::Tensor read(const std::string& tensor) const;       // dequantised to float32

 private:
  struct Entry {
    std::vector<int64_t> shape;
    uint32_t type;
    uint64_t begin;
  };
  const Value& value(const std::string& key) const;
  const Entry& entry(const std::string& tensor) const;

  std::filesystem::path path_;
  std::map<std::string, Value> values_;
  std::map<std::string, Entry> tensors_;
  mutable std::ifstream in_;
  uint64_t size_ = 0;
};

}  // namespace moegraft::convert
