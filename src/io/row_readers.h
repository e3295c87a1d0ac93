#pragma once
// One reader a format (rows.cpp has the table): makes rows of a file and hands them to Rows.

#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>

#include "moegraft/io/rows.h"

namespace moegraft::io {

class Spool;      // tar.cpp: pictures of compressed tars
class OpenTable;  // arrow/table.h: the Parquet or Arrow file that is open

// What stores of one data set share: it may have more files than a process may open.
struct OpenFiles {
  std::mutex lock;
  std::shared_ptr<Spool> spool;
  std::shared_ptr<OpenTable> table;  // of table_owner
  const void* table_owner = nullptr;
  std::map<std::string, int64_t> passed_over;  // files in tars that are neither picture nor text, by extension
};

class Rows {
 public:
  Rows(const TakeRow& take, const RefuseRow& refuse)
      : take_(take), refuse_(refuse), open_(std::make_shared<OpenFiles>()) {}
  // Makes a row and hands it on; what is wrong with it is told.
  void add(const std::string& where, const std::function<Row()>& make);
  void refuse(const std::string& why) const;
  const std::shared_ptr<OpenFiles>& open() const { return open_; }

 private:
  const TakeRow& take_;
  const RefuseRow& refuse_;
  std::shared_ptr<OpenFiles> open_;
};

void read_lines(const std::filesystem::path& path, Rows& rows);
void read_csv(const std::filesystem::path& path, Rows& rows);
void read_labels(const std::filesystem::path& folder,
                 Rows& rows);  // a folder for each label, which is the text of its pictures
void read_tar(const std::filesystem::path& path, Rows& rows);
void read_parquet(const std::filesystem::path& path, Rows& rows);
void read_arrow(const std::filesystem::path& path, Rows& rows);

// "." where the name has none: what rows name lies there.
inline std::filesystem::path folder_of(const std::filesystem::path& file) {
  return file.has_parent_path() ? file.parent_path() : ".";
}

// JSON that nests no deeper than its parser and printers stand.
Json parse_row(const std::string& text, const std::string& where);

}  // namespace moegraft::io
