#pragma once
// The directory of a checkpoint: names, manifest, and which file holds which rows.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/io/safetensors.h"

namespace moegraft::checkpoint {

constexpr const char* kState = "state.json";
constexpr const char* kManifest = "manifest.json";
enum class Kind { adapter, optimizer };

std::string tensor_file(Kind kind, int64_t rank,
                        int64_t world_size);  // adapter.safetensors, adapter-00001-of-00004.safetensors

struct Slice {
  int64_t first = 0, total = 0;
  bool operator==(const Slice&) const = default;
};
struct FileEntry {
  uint64_t size = 0;
  std::string checksum;
  std::map<std::string, Slice> slices;  // tensors of which the file holds only some rows
};
struct Manifest {
  int64_t step = 0, world_size = 1;
  std::optional<double> measure;
  std::map<std::string, FileEntry> files;
};

// size and checksum of a written file.
FileEntry describe_file(const std::filesystem::path& path);
void write_manifest(const std::filesystem::path& dir, const Manifest& manifest);
// UserError when it is missing, damaged or of another version.
Manifest read_manifest(const std::filesystem::path& dir);
std::optional<double> recorded_measure(const std::filesystem::path& dir);  // none too when the manifest does not read

// A slice file says itself what it holds; rank 0 copies that to the manifest.
std::map<std::string, std::string> slice_metadata(const std::map<std::string, Slice>& slices);
std::map<std::string, Slice> read_slices(const std::filesystem::path& file);

// The tensors of one kind, put together from the files that the manifest names. UserError: a tensor in two files, rows
// that are missing or in two files, slices that do not fit each other.
class Assembly {
 public:
  Assembly(const std::filesystem::path& dir, const Manifest& manifest, Kind kind);
  io::TensorMap tensors() const;

 private:
  struct Piece {
    size_t file;
    int64_t first, rows, total;  // total 0: whole
  };
  void check(const std::string& name, const std::vector<Piece>& pieces) const;
  std::vector<io::SafetensorsFile> files_;
  std::vector<std::string> names_;
  std::map<std::string, std::vector<Piece>> pieces_;  // by first row
};

}  // namespace moegraft::checkpoint
