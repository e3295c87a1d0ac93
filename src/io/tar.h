#pragma once
// Tars through libarchive: members in order, and pictures in them that can be read later.

#include <archive.h>
#include <archive_entry.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moegraft/io/picture.h"

namespace moegraft::io {

// An unlinked temporary file for what compressed tars hold: they cannot be read from the middle.
class Spool {
 public:
  static constexpr int64_t kMostBytes =
      int64_t{4} << 30;  // of one data set; a larger one is unpacked by its owner, who knows where there is room
  Spool();
  ~Spool();
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;
  void append(const void* data, size_t bytes, const std::string& whose);
  int64_t size() const { return size_; }
  int descriptor() const { return fd_; }

 private:
  std::filesystem::path folder_;
  int fd_ = -1;
  int64_t size_ = 0;
};

// One pass over a tar. Nothing is ever written under a name that a tar holds.
class TarReader {
 public:
  explicit TarReader(const std::filesystem::path& path);
  ~TarReader();
  TarReader(const TarReader&) = delete;
  TarReader& operator=(const TarReader&) = delete;

  // False at the end. UserError where the tar is damaged or cut short: where the next member begins cannot be told.
  bool next();
  const std::string& name() const { return name_; }
  bool is_folder() const { return type_ == AE_IFDIR; }
  std::string strange() const;  // why it is no plain file ("is a link", …); empty: it is one
  int64_t size() const { return size_; }
  bool compressed() const { return compressed_; }
  int64_t offset() const { return offset_; }  // of its bytes in the file, unless compressed
  std::string read_text(int64_t most);        // UserError: longer
  void spool(Spool& into);                    // appends its bytes
  int64_t file_bytes() const { return file_bytes_; }
  int64_t modified_ns() const { return modified_ns_; }

 private:
  [[noreturn]] void damaged(const std::string& why) const;
  std::filesystem::path path_;
  int fd_ = -1;
  archive* archive_ = nullptr;
  archive_entry* entry_ = nullptr;
  std::string name_, last_;
  unsigned type_ = 0;
  int64_t size_ = 0, offset_ = 0, end_ = 0, members_ = 0, file_bytes_ = 0, modified_ns_ = 0;
  bool compressed_ = false;
};

// The pictures of one tar: places in the file, or in the spool.
class TarStore : public PictureStore {
 public:
  TarStore(const std::filesystem::path& path, const TarReader& reader)
      : PictureStore(path), file_bytes_(reader.file_bytes()), modified_ns_(reader.modified_ns()) {}
  int64_t add(std::string member, int64_t offset, int64_t bytes, std::shared_ptr<Spool> spool);
  const std::string& member(int64_t index) const { return members_[size_t(index)].name; }
  std::string name(int64_t index) const override { return path().string() + ": " + member(index); }
  std::string read(int64_t index) const override;

 private:
  struct Member {
    std::string name;
    int64_t offset, bytes;
  };
  std::vector<Member> members_;
  std::shared_ptr<Spool> spool_;  // of a compressed tar
  int64_t file_bytes_, modified_ns_;
};

}  // namespace moegraft::io
