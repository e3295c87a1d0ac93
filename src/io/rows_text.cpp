#include <algorithm>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "row_readers.h"

namespace moegraft::io {
namespace {

std::string_view without_byte_order_mark(std::string_view text) {
  return text.starts_with("\xEF\xBB\xBF") ? text.substr(3) : text;
}

Row row_of_line(const std::filesystem::path& file, int64_t number, const std::string& where) {
  Row row;
  row.where = where, row.number = number, row.folder = folder_of(file);
  return row;
}

// Fields of a row of comma-separated values: a quote that opens a field makes it hold commas, line ends and doubled
// quotes (RFC 4180); within a field it is a character (as Python's csv reads it).
std::vector<std::string> read_csv_row(std::string_view& rest, const std::string& where) {
  std::vector<std::string> fields(1);
  bool quoted = false, begins = true;
  for (; !rest.empty(); rest.remove_prefix(1)) {
    const char c = rest[0];
    const bool opens = std::exchange(begins, false) && c == '"';
    if (quoted) {
      if (c != '"')
        fields.back() += c;
      else if (rest.size() > 1 && rest[1] == '"')
        fields.back() += '"', rest.remove_prefix(1);
      else
        quoted = false;
    } else if (opens) {
      quoted = true;
    } else if (c == ',') {
      fields.emplace_back(), begins = true;
    } else if (c == '\n') {
      rest.remove_prefix(1);
      break;
    } else if (c != '\r') {
      fields.back() += c;
    }
  }
  MOEGRAFT_CHECK(!quoted, where,
                 ": a quote opens in this row and never closes: where the next row begins cannot be told");
  return fields;
}

}  // namespace

Json parse_row(const std::string& text, const std::string& where) {
  MOEGRAFT_CHECK(json_depth(text) <= kMostJsonDepth, where, ": brackets nest too deep");
  return Json::parse(text);
}

void check_utf8(const std::string& text, const std::string& where) {
  try {
    Json(text).dump();  // the JSON library's own rule, so that every format has that of JSONL
  } catch (const Json::exception&) {
    fail(where, ": its text is not UTF-8 (", shortened(text, 40), "); convert it: iconv -f LATIN1 -t UTF-8");
  }
}

void read_lines(const std::filesystem::path& path, Rows& rows) {
  const std::string text = read_file(path);
  std::string_view rest = without_byte_order_mark(text);
  MOEGRAFT_CHECK(!rest.starts_with("\x1f\x8b") && !rest.starts_with("\x28\xb5\x2f\xfd"), path.string(),
                 " is compressed, and neither a tar nor Parquet: unpack it first (gunzip, unzstd)");
  const size_t first = rest.find_first_not_of(" \t\r\n");
  MOEGRAFT_CHECK(first == std::string_view::npos || rest[first] != '[', path.string(),
                 " is one JSON list; one object a line is expected (JSONL): jq -c '.[]' ", path.string(),
                 " > NEW.jsonl");
  for (int64_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string line = trim(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.empty()) continue;
    const std::string where = path.string() + ":" + std::to_string(number);
    rows.add(where, [&] {
      Row row = row_of_line(path, number, where);
      row.json = parse_row(line, where);
      return row;
    });
  }
}

void read_csv(const std::filesystem::path& path, Rows& rows) {
  const std::string text = read_file(path);
  std::string_view rest = without_byte_order_mark(text);
  const auto keys = read_csv_row(rest, path.string() + ":1");
  for (int64_t number = 2; !rest.empty(); ++number) {
    const std::string where = path.string() + ":" + std::to_string(number);
    const auto fields = read_csv_row(rest, where);
    if (fields.size() == 1 && trim(fields[0]).empty()) continue;
    rows.add(where, [&] {
      MOEGRAFT_CHECK(fields.size() == keys.size(), where, ": ", fields.size(), " fields, the first row names ",
                     keys.size());
      Row row = row_of_line(path, number, where);
      row.json = Json::object();
      for (size_t i = 0; i < keys.size(); ++i) {
        check_utf8(fields[i], where);
        row.json[keys[i]] = fields[i];
      }
      return row;
    });
  }
}

// A picture beside the folders has no label.
void read_labels(const std::filesystem::path& folder, Rows& rows) {
  std::vector<std::filesystem::path> pictures;
  const auto take = [&](const std::filesystem::path& file) {
    if (has_picture_extension(file.filename().string())) pictures.push_back(file.lexically_relative(folder));
  };
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    if (!item.is_directory()) {
      take(item.path());
      continue;
    }
    if (item.path().filename().string().starts_with(".")) continue;  // thumbnails and the like
    for (const auto& inner : std::filesystem::directory_iterator(item)) {
      const std::string name = inner.path().filename().string();
      MOEGRAFT_CHECK(!inner.is_directory() && name != "metadata.jsonl" && name != "metadata.csv", folder.string(),
                     " holds ImageFolders (splits?), not a folder for each label: name one of them, such as ",
                     item.path().string());
      take(inner.path());
    }
  }
  std::sort(pictures.begin(), pictures.end());
  int64_t number = 0;
  for (const auto& picture : pictures) {
    const std::string where = (folder / "(pictures)").string() + ":" + std::to_string(++number);
    rows.add(where, [&] {
      Row row = row_of_line(folder / "(pictures)", number, where);
      row.json = Json{{"image", picture.string()}, {"text", picture.parent_path().string()}};
      return row;
    });
  }
}

}  // namespace moegraft::io
