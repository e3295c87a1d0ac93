#include "moegraft/io/rows.h"

#include <algorithm>
#include <fstream>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"
#include "row_files.h"
#include "row_readers.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

struct Format {
  const char* name;
  std::vector<std::string> endings;
  std::string_view magic;  // at the start of a file with another ending
  bool whole;              // pictures lie in the file: all of it counts for a fingerprint, folders of them are read
  void (*read)(const fs::path&, Rows&);
};

const std::vector<Format>& formats() {
  using namespace std::string_view_literals;
  static const std::vector<Format> all{
      {"tar", {".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"}, {}, true, read_tar},
      {"Parquet", {".parquet"}, "PAR1"sv, true, read_parquet},
      {"Arrow", {".arrow"}, "ARROW1"sv, true, read_arrow},
      {"CSV", {".csv"}, {}, false, read_csv},
      {"JSONL", {".jsonl", ".json"}, {}, false, read_lines}};
  return all;
}

bool is_named_as(const fs::path& file, const Format& format) {
  const std::string name = lower_case(file.filename().string());
  return std::any_of(format.endings.begin(), format.endings.end(),
                     [&](const auto& ending) { return name.ends_with(ending); });
}

const Format& format_of(const fs::path& file) {
  std::error_code error;
  const auto type = fs::status(file, error).type();  // opening a pipe waits for who writes into it
  MOEGRAFT_CHECK(type != fs::file_type::fifo && type != fs::file_type::socket && type != fs::file_type::character &&
                     type != fs::file_type::block,
                 file.string(), " is a pipe or a device, expected a file");
  std::string start(8, '\0');
  std::ifstream(file, std::ios::binary).read(start.data(), std::streamsize(start.size()));
  for (const auto& format : formats())  // an ending may lie, these do not
    if (!format.magic.empty() && start.starts_with(format.magic)) return format;
  for (const auto& format : formats())
    if (is_named_as(file, format)) return format;
  return formats().back();
}

bool is_whole(const fs::path& file) {
  return std::any_of(formats().begin(), formats().end(),
                     [&](const Format& f) { return f.whole && is_named_as(file, f); });
}

std::vector<fs::path> whole_files_in(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& item : fs::directory_iterator(folder))
    if (!item.is_directory() && is_whole(item.path()))
      files.push_back(item.path());  // a link that leads nowhere is an error, not a smaller data set
  std::sort(files.begin(), files.end());
  return files;
}

// What lies beside the files of `place` and would not be read with them: rows elsewhere in the folder, downloads that
// have not ended.
void check_whole_folder(const fs::path& folder, const fs::path& place) {
  for (const auto& at : place == folder ? std::vector{folder} : std::vector{folder, place})
    for (const auto& item : fs::directory_iterator(at)) {
      const std::string name = item.path().filename().string();
      if (name.starts_with(".") || item.path() == place) continue;
      MOEGRAFT_CHECK(!item.is_directory() || whole_files_in(item.path()).empty(), folder.string(), " holds data in ",
                     at == place ? "itself" : place.filename().string(), " and in ", name,
                     ": name the folder that is meant");
      for (const char* begun : {".incomplete", ".part", ".crdownload", ".aria2"})
        MOEGRAFT_CHECK(
            !name.ends_with(begun) || !is_whole(name.substr(0, name.size() - std::string_view(begun).size())),
            at.string(), " holds ", name, ", a download that has not ended: finish or remove it");
      if (name.ends_with(".jsonl") || name.ends_with(".csv"))
        log::warning((at / name).string(),
                     " is passed over beside the data files of its folder; name it alone if it is meant");
    }
}

// Tars, Parquet or Arrow files that a folder is made of; empty: it is something else.
std::vector<fs::path> files_of_folder(const fs::path& folder) {
  if (fs::exists(folder / "dataset_dict.json")) {
    const auto splits = splits_of_dict(folder);
    fail(folder.string(), " holds the splits of a data set, ", join(splits, ", "), ": name one of them, such as ",
         (folder / (splits.empty() ? "train" : splits.front())).string());
  }
  if (fs::exists(folder / "state.json")) return files_of_state(folder);
  for (const auto& place : {folder, folder / "data"}) {
    if (!fs::is_directory(place)) continue;
    const auto files = whole_files_in(place);
    if (files.empty()) continue;
    const Format& first = format_of(files.front());
    for (const auto& file : files) {
      const Format& other = format_of(file);
      MOEGRAFT_CHECK(&other == &first, place.string(), " holds ", first.name, " and ", other.name,
                     " files: name those that are meant, such as ", files.front().string());
    }
    check_whole_folder(folder, place);
    check_one_split(place, files);
    check_numbering(files);
    return files;
  }
  for (const auto& item : fs::directory_iterator(folder))
    MOEGRAFT_CHECK(!item.is_directory() || whole_files_in(item.path()).empty(), folder.string(),
                   " holds data sets (configurations or splits?): name one of them, such as ", item.path().string());
  return {};
}

void read_folder(const fs::path& folder, Rows& rows) {
  for (const char* metadata : {"metadata.jsonl", "metadata.csv"})
    MOEGRAFT_CHECK(!fs::exists(folder / metadata) || whole_files_in(folder).empty(), folder.string(), " holds ",
                   metadata, " and ", whole_files_in(folder).front().filename().string(),
                   ": name the one that is meant");
  if (fs::exists(folder / "metadata.jsonl")) return read_lines(folder / "metadata.jsonl", rows);
  if (fs::exists(folder / "metadata.csv")) return read_csv(folder / "metadata.csv", rows);
  const auto files = files_of_folder(folder);
  if (files.empty()) return read_labels(folder, rows);
  Progress progress(folder.filename().string(), int64_t(files.size()));
  for (size_t i = 0; i < files.size(); ++i) {
    format_of(files[i]).read(files[i], rows);
    progress.update(int64_t(i) + 1);
  }
  progress.finish();
}

}  // namespace

Picture Row::picture(const std::string& name) const {
  if (const auto inside = pictures.find(name); inside != pictures.end()) return inside->second;
  MOEGRAFT_CHECK(!name.empty(), where, ": an image path is empty");
  MOEGRAFT_CHECK(!name.starts_with("data:"), where, ": the picture is in the manifest itself (", shortened(name, 40),
                 "); write it to a file and name that");
  MOEGRAFT_CHECK(!name.starts_with("http://") && !name.starts_with("https://"), where, ": ", shortened(name),
                 " is an address; load the picture and name the file");
  MOEGRAFT_CHECK(!folder.empty(), where, ": image not found: ", shortened(name), " is not among the files of this key");
  const fs::path file = folder / name;
  std::error_code error;
  MOEGRAFT_CHECK(fs::is_regular_file(file, error), where, ": image not found: ", file.string());
  return file;
}

void Rows::add(const std::string& where, const std::function<Row()>& make) {
  try {
    take_(make());
  } catch (const Json::exception& e) {
    std::string what = e.what();
    if (const size_t cut = what.find("] "); cut != std::string::npos) what = what.substr(cut + 2);
    refuse(where + ": not valid JSON: " + shortened(what, 160));
  } catch (const UserError& e) { refuse(e.what()); }
}

void Rows::refuse(const std::string& why) const {
  if (!refuse_) fail<UserError>(why);
  refuse_(why);
}

void read_rows(const fs::path& path, const TakeRow& take, const RefuseRow& refuse) {
  Rows rows(take, refuse);
  for (const auto& file : expand_braces(path)) {
    if (fs::is_directory(file))
      read_folder(file, rows);
    else
      format_of(file).read(file, rows);
  }
  std::vector<std::string> passed_over;
  for (const auto& [extension, count] : rows.open()->passed_over)
    passed_over.push_back(extension + " (" + std::to_string(count) + ")");
  if (!passed_over.empty())
    log::info(path.string(),
              ": files that are neither picture nor text are passed over: ", shortened(join(passed_over, ", "), 200));
}

bool is_row_format(const fs::path& file) {
  return std::any_of(formats().begin(), formats().end(),
                     [&](const Format& f) { return std::string_view(f.name) != "CSV" && is_named_as(file, f); });
}

bool is_file_pattern(const fs::path& path) {
  std::error_code error;
  return path.string().find('{') != std::string::npos && !fs::exists(path, error);
}

std::string fingerprint_rows(const fs::path& path) {
  std::vector<fs::path> files;
  for (const auto& part : expand_braces(path)) {
    if (!fs::is_directory(part))
      files.push_back(part);
    else if (!fs::exists(part / "metadata.jsonl") && !fs::exists(part / "metadata.csv"))
      for (const auto& file : files_of_folder(part)) files.push_back(file);
  }
  if (!is_file_pattern(path) && (files.empty() || !format_of(files.front()).whole)) return {};
  std::string text;
  for (const auto& file : files) text += file.filename().string() + " " + std::to_string(checksum_file(file)) + "\n";
  return checksum_hex(text);
}

}  // namespace moegraft::io
