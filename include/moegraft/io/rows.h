#pragma once
// Data sets as people have them, row by row: whatever the format, a row is what a line of a JSONL manifest would be.
// What its keys mean is the reader's business (data/manifest.h, codec/pictures.h). Heavy like json.h: include it in
// .cpp files only.
//
//   x.jsonl, x.csv            a row a line; pictures are files, named relative to the manifest's folder
//   a folder                  ImageFolder: metadata.jsonl, metadata.csv, or a folder for each label
//   x.tar, .tar.gz, .tar.zst  WebDataset: files of one key (up to the first dot of the name) are a row; .json,
//   .txt/.text/.caption, and pictures x.parquet, x.arrow        Hugging Face: columns are keys; a picture is
//   struct<bytes, path>, binary, or a string that names a file folders of these          the hub's layout
//   (data/train-00000-of-00002.parquet), what save_to_disk leaves, or tars; one split at a time x-{000..123}.tar
//   WebDataset's braces, for any of these files; {a,b} too

#include <functional>
#include <map>

#include "moegraft/io/json.h"
#include "moegraft/io/picture.h"

namespace moegraft::io {

struct Row {
  Json json;
  std::string where;   // "m.jsonl:3", "x.tar: 0001", "x.parquet: row 7" (Hugging Face counts from 0)
  int64_t number = 0;  // in its file, from 1
  std::map<std::string, Picture> pictures;  // that lie in the file itself, by the strings that stand for them in json
  std::filesystem::path folder;             // of the files that other strings name; empty: there are none

  // What a string of json names. UserError: an address, a picture in the text, no such file.
  Picture picture(const std::string& name) const;
};

using TakeRow = std::function<void(const Row&)>;  // a UserError of it is told like that of a row that cannot be read
using RefuseRow = std::function<void(const std::string& why)>;  // "where: why"

// refuse: told of each row that cannot be read, which is left out; without it the first one is an error. UserError: no
// such file, a file that is damaged or cut short as a whole (what follows is lost), a folder that could mean several
// things.
void read_rows(const std::filesystem::path& path, const TakeRow& take, const RefuseRow& refuse = {});

// UserError "where: its text is not UTF-8 …": the rule of every format, and of plain text.
void check_utf8(const std::string& text, const std::string& where);
// Whether a file's name says that it is a tar, Parquet, Arrow or JSONL file: rows, not lines of text.
bool is_row_format(const std::filesystem::path& file);
// Whether this says several files by braces.
bool is_file_pattern(const std::filesystem::path& path);
// 16 hex digits of all that a tar, Parquet or Arrow set or a pattern of files holds: every byte counts. Empty for the
// other kinds.
std::string fingerprint_rows(const std::filesystem::path& path);
// Whether Parquet and Arrow files are read (Apache Arrow was there when this was built).
bool reads_arrow();

}  // namespace moegraft::io
