#pragma once
// Where a picture lies. Lists of millions of these stand for a data set: the bytes are read when they are needed and
// held by nobody here.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "moegraft/base/check.h"

namespace moegraft::io {

// A file of a data set is not what it was when its rows were read: the whole job is wrong, not one picture.
struct SourceChanged : UserError {
  using UserError::UserError;
};

// A file that holds many pictures, kept alive by the Pictures in it. Several threads may read.
class PictureStore {
 public:
  explicit PictureStore(std::filesystem::path path) : path_(std::move(path)) {}
  virtual ~PictureStore() = default;
  const std::filesystem::path& path() const { return path_; }
  virtual std::string name(int64_t index) const = 0;  // unique, for people: "x.tar: 0001.png"
  virtual std::string read(
      int64_t index) const = 0;  // a PNG, JPEG, … as a string. UserError: cannot be read; SourceChanged

 private:
  std::filesystem::path path_;
};

class Picture {
 public:
  Picture() = default;                                             // none
  Picture(std::filesystem::path file) : file_(std::move(file)) {}  // a file of its own; implicit: the usual case
  Picture(std::shared_ptr<const PictureStore> store, int64_t index) : store_(std::move(store)), index_(index) {}

  bool empty() const { return !store_ && file_.empty(); }
  std::string name() const { return store_ ? store_->name(index_) : file_.string(); }
  std::string read() const;

  // By file, then by place: who reads in this order reads every file from its start to its end.
  friend bool operator==(const Picture& a, const Picture& b) { return a.index_ == b.index_ && a.path() == b.path(); }
  friend bool operator<(const Picture& a, const Picture& b) {
    const int order = a.path().compare(b.path());
    return order != 0 ? order < 0 : a.index_ < b.index_;
  }

 private:
  const std::filesystem::path& path() const { return store_ ? store_->path() : file_; }
  std::filesystem::path file_;
  std::shared_ptr<const PictureStore> store_;
  int64_t index_ = -1;  // in the store
};

}  // namespace moegraft::io
