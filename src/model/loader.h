#pragma once
// The tensors of a Hugging Face directory, and how they become a model's: found by name, checked, converted, brought to
// a device.

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "moegraft/io/safetensors.h"
#include "moegraft/model/weights.h"
#include "staged_load.h"

namespace moegraft::model {

void warn_once(const std::string& line);  // a command may load a base more than once

// One file, or shards with an index. As in transformers the single file goes before an index, every tensor of a listed
// shard counts, and of two with one name the one in the last file.
class TensorSource {
 public:
  explicit TensorSource(const std::filesystem::path& dir);

  const std::filesystem::path& dir() const { return dir_; }
  bool contains(const std::string& name) const { return find(name) != where_.end(); }
  at::Tensor tensor(const std::string& name) const;
  // Where the bytes of what tensor() gives lie; none: the file does not align them.
  std::optional<io::FileRange> range(const std::string& name) const;
  // The name in the file of what the family calls `name`; empty when absent.
  std::string stored_name(const std::string& name) const;
  bool holds(const at::Tensor& t) const;
  void release(const at::Tensor& t) const;
  std::vector<std::string> names() const;

 private:
  using Where = std::map<std::string, size_t>;
  void open(const std::filesystem::path& file);
  Where::const_iterator find(const std::string& name) const;

  std::filesystem::path dir_;
  std::vector<io::SafetensorsFile> files_;
  Where where_;
};

// Takes tensors by name, checks shapes, converts; collects every problem so that one message shows them all.
class Loader {
 public:
  Loader(const TensorSource& source, const LoadOptions& options, std::string where);

  // count > 0: only these rows. into: where to, contiguous; undefined: the loader's choice, the mapped file where dtype
  // and device agree.
  at::Tensor take(const std::string& name, const std::vector<int64_t>& shape, int64_t first = 0, int64_t count = 0,
                  at::Tensor into = {});
  // Room of the model's dtype on its device for take(); undefined where tensors stay in the files.
  at::Tensor room(at::IntArrayRef shape) const {
    return staged_ && !on_cpu_ && dtype_ ? at::empty(shape, at::TensorOptions(*dtype_).device(options_.device))
                                         : at::Tensor();
  }
  // Belongs to the model, though it is not taken here.
  void use(const std::string& name) { used_.insert(source_.stored_name(name)); }
  // Whether two tensors are the same numbers in the model's dtype.
  bool same(const std::string& a, const std::string& b) const;
  // Takes to this device, straight from the files, or to the one that the options name again.
  void keep_on_cpu(bool on) { on_cpu_ = on; }
  // What is taken from now on becomes this; none: it stays what the file holds.
  void keep_dtype(std::optional<at::ScalarType> dtype) { dtype_ = dtype; }
  void problem(const std::string& text);
  bool clean() const { return count_ == 0; }
  // What the file holds beyond the model: deeper layers are another model's, the rest is left out as in transformers,
  // which lists it as UNEXPECTED.
  void check_rest(int64_t num_layers);
  // UserError with all problems; then everything taken for the device is brought there.
  void finish();

 private:
  const TensorSource& source_;
  LoadOptions options_;
  std::optional<at::ScalarType> dtype_ = options_.dtype;
  std::string where_;
  std::optional<StagedLoad> staged_;
  bool on_cpu_ = false;
  std::vector<std::string> problems_;
  std::set<std::string> used_;
  int64_t count_ = 0;
};

}  // namespace moegraft::model
