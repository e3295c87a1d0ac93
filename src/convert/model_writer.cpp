#include "model_writer.h"

#include <cstdio>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/progress.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::convert {

namespace fs = std::filesystem;

ModelDirectory::ModelDirectory(const fs::path& dir) : folder_(dir) {
  const fs::path& target = folder_.target();
  MOEGRAFT_CHECK_USAGE(!fs::exists(target) || (fs::is_directory(target) && fs::is_empty(target)), dir.string(),
                       " exists already: name another folder, or remove it first");
}

void ModelDirectory::write_weights(const std::vector<ModelTensor>& tensors, const WriteOptions& options) {
  std::vector<int64_t> bytes;
  std::vector<size_t> ends;  // of each file's tensors
  int64_t total = 0, in_file = 0, parameters = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    int64_t elements = 1;
    for (const int64_t size : tensors[i].shape) elements *= size;
    const int64_t here = elements * int64_t(c10::elementSize(options.dtype));
    if (in_file > 0 && in_file + here > options.max_shard_bytes) ends.push_back(i), in_file = 0;
    in_file += here, total += here, parameters += elements;
  }
  ends.push_back(tensors.size());
  io::Json map = io::Json::object();
  Progress progress("weights", int64_t(tensors.size()));
  for (size_t file = 0, i = 0; file < ends.size(); ++file) {
    char name[64] = "model.safetensors";
    if (ends.size() > 1) std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", file + 1, ends.size());
    io::TensorMap part;
    for (; i < ends[file]; ++i) {
      const at::Tensor t = tensors[i].make();
      MOEGRAFT_CHECK(t.sizes() == at::IntArrayRef(tensors[i].shape), tensors[i].name, " must have shape ",
                     at::IntArrayRef(tensors[i].shape), ", got ", t.sizes());
      part[tensors[i].name] = t.to(options.dtype).contiguous();
      map[tensors[i].name] = name;
      progress.update(int64_t(i) + 1);
    }
    io::save_safetensors(path() / name, part, {{"format", "pt"}});
  }
  progress.finish();
  if (ends.size() > 1)
    io::write_json(path() / "model.safetensors.index.json",
                   {{"metadata", {{"total_size", total}, {"total_parameters", parameters}}}, {"weight_map", map}});
}

void ModelDirectory::write_json(const std::string& name, const io::Json& j) { io::write_json(path() / name, j); }

void ModelDirectory::copy(const fs::path& file) {
  io::write_file_atomic(path() / file.filename(), io::read_file(file));
}

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kHalf ? "float16" : "bfloat16";
}

}  // namespace moegraft::convert
