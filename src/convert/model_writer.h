#pragma once
// Writes a Hugging Face model directory tensor by tensor: only one file's tensors are in memory at a time.

#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "moegraft/io/json.h"
#include "moegraft/io/staged_folder.h"

namespace moegraft::convert {

struct ModelTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::function<at::Tensor()> make;
};

// How a model directory is written by a conversion.
struct WriteOptions {
  at::ScalarType dtype = at::kBFloat16;
  int64_t max_shard_bytes = int64_t{2} << 30;
};

class ModelDirectory {
 public:
  // UsageError when `dir` exists and is not an empty folder. All is written beside it and appears under its name with
  // publish().
  explicit ModelDirectory(const std::filesystem::path& dir);

  // model.safetensors, or files and an index above max_shard_bytes. Tensors are made in the order given. UserError when
  // one has another shape than it was said to have.
  void write_weights(const std::vector<ModelTensor>& tensors, const WriteOptions& options);
  void write_json(const std::string& name, const io::Json& j);
  void copy(const std::filesystem::path& file);
  const std::filesystem::path& path() const { return folder_.path(); }  // where it is until publish()
  void publish() { folder_.publish(); }

 private:
  io::StagedFolder folder_;
};

const char* dtype_name(at::ScalarType dtype);  // as config.json spells it

}  // namespace moegraft::convert
