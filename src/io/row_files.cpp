#include "row_files.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <map>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/json.h"
#include "moegraft/io/rows.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostFiles = 1'000'000;

// "000..012" -> 000, 001, …, 012: as wide as the wider end where one begins with a zero. Empty: no range.
std::vector<std::string> expand_range(std::string_view text, const std::string& whole) {
  const size_t dots = text.find("..");
  if (dots == std::string_view::npos) return {};
  const std::string_view from = text.substr(0, dots), to = text.substr(dots + 2);
  int64_t first = 0, last = 0;
  const auto number = [](std::string_view digits, int64_t& value) {
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return error == std::errc() && end == digits.data() + digits.size() && value >= 0 && digits[0] != '-';
  };
  if (from.empty() || to.empty() || !number(from, first) || !number(to, last)) return {};
  MOEGRAFT_CHECK(first <= last, whole, ": {", std::string(text), "} counts down; write {", std::string(to), "..",
                 std::string(from), "}");
  MOEGRAFT_CHECK(uint64_t(last - first) < kMostFiles, whole, ": {", std::string(text), "} is more than ", kMostFiles,
                 " files");
  const bool padded = (from.size() > 1 && from[0] == '0') || (to.size() > 1 && to[0] == '0');
  const size_t width = padded ? std::max(from.size(), to.size()) : 0;
  std::vector<std::string> out;
  for (int64_t i = first; i <= last; ++i) {
    const std::string digits = std::to_string(i);
    out.push_back(std::string(width > digits.size() ? width - digits.size() : 0, '0') + digits);
  }
  return out;
}

// The commas of "a,{b,c},d" that are not inside inner braces.
std::vector<std::string> split_outside_braces(std::string_view text) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{') - (c == '}');
    if (c == ',' && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

std::vector<std::string> expand(const std::string& text, const std::string& whole, int depth = 0) {
  MOEGRAFT_CHECK(depth < 20, whole, ": braces nest too deep, or too many follow each other");
  const size_t open = text.find('{');
  if (open == std::string::npos) return {text};
  size_t close = open;
  for (int level = 0; close < text.size(); ++close)
    if ((level += (text[close] == '{') - (text[close] == '}')) == 0) break;
  MOEGRAFT_CHECK(close < text.size(), whole, ": a brace opens and never closes");
  const std::string inside = text.substr(open + 1, close - open - 1);
  auto choices = expand_range(inside, whole);
  if (choices.empty()) choices = split_outside_braces(inside);
  MOEGRAFT_CHECK(choices.size() > 1 || inside.find("..") != std::string::npos, whole, ": {", inside,
                 "} is neither a range such as {000..123} nor a list such as {a,b}");
  std::vector<std::string> out;
  const auto ends = expand(text.substr(close + 1), whole, depth + 1);
  for (const auto& choice : choices)
    for (const auto& middle : expand(choice, whole, depth + 1))
      for (const auto& end : ends) {
        MOEGRAFT_CHECK(out.size() < kMostFiles, whole, " is more than ", kMostFiles, " files");
        out.push_back(text.substr(0, open) + middle + end);
      }
  return out;
}

// The split that a file's name tells, by the words of the Hub (docs/hub/datasets-file-names-and-splits); "" when it
// tells none.
std::string split_of(const fs::path& file) {
  static const std::map<std::string, std::string> words{
      {"train", "train"},      {"training", "train"}, {"validation", "validation"},
      {"valid", "validation"}, {"val", "validation"}, {"dev", "validation"},
      {"test", "test"},        {"testing", "test"},   {"eval", "test"},
      {"evaluation", "test"}};
  for (const std::string& word : words_of(file.filename().string())) {
    std::string letters;
    for (const char c : word)
      if (!std::isdigit(static_cast<unsigned char>(c))) letters += c;
    if (const auto found = words.find(letters); found != words.end()) return found->second;
  }
  return {};
}

}  // namespace

std::vector<fs::path> expand_braces(const fs::path& path) {
  if (!is_file_pattern(path)) return {path};
  const std::string text = path.string();
  std::error_code error;
  std::vector<fs::path> files;
  for (auto& name : expand(text, text)) files.emplace_back(std::move(name));
  for (const auto& file : files)
    MOEGRAFT_CHECK(fs::exists(file, error), text, " stands for ", files.size(), " files, of which ", file.string(),
                   " is not there");
  return files;
}

void check_one_split(const fs::path& folder, const std::vector<fs::path>& files) {
  std::map<std::string, std::vector<fs::path>> splits;
  for (const auto& file : files)
    if (const std::string split = split_of(file); !split.empty()) splits[split].push_back(file);
  if (splits.size() < 2) return;
  std::vector<std::string> names;
  for (const auto& [name, its] : splits) names.push_back(name);
  const auto& first = splits.contains("train") ? splits.at("train") : splits.begin()->second;
  fail(folder.string(), " holds the splits ", join(names, ", "),
       ", which do not belong together: name the files of one, such as ", first.front().string(),
       first.size() > 1 ? " (several by braces: x-{00000.." + std::to_string(first.size() - 1) + "}…)" : "");
}

void check_numbering(const std::vector<fs::path>& files) {
  std::map<std::pair<std::string, int64_t>, std::set<std::string>>
      present;  // by what such names have in common, "train-?-of-00002.parquet", and the number of files that it tells
  for (const auto& file : files) {
    const std::string name = file.filename().string();
    const size_t of = name.rfind("-of-"),
                 dash = of == std::string::npos || of == 0 ? of : name.find_last_of("-", of - 1),
                 first = dash == std::string::npos ? 0 : dash + 1;
    int64_t number = 0, count = 0;
    if (of == std::string::npos || first >= of) continue;
    const auto [number_end, bad_number] = std::from_chars(name.data() + first, name.data() + of, number);
    const auto [count_end, bad_count] = std::from_chars(name.data() + of + 4, name.data() + name.size(), count);
    if (bad_number == std::errc() && bad_count == std::errc() && number_end == name.data() + of)
      present[{name.substr(0, first) + "?" + name.substr(of), count}].insert(name.substr(first, of - first));
  }
  for (const auto& [named, numbers] : present) {
    const auto& [name, expected] = named;
    MOEGRAFT_CHECK(int64_t(numbers.size()) >= expected, files.front().parent_path().string(), " holds ", numbers.size(),
                   " of the ", expected, " files ", name,
                   " that their names speak of: fetch the rest, or name those that are meant");
  }
}

std::vector<fs::path> files_of_state(const fs::path& folder) {
  const fs::path file = folder / "state.json";
  const Json state = read_json(file);
  MOEGRAFT_CHECK(state.is_object() && state.contains("_data_files") && state["_data_files"].is_array() &&
                     !state["_data_files"].empty(),
                 file.string(), " lists no \"_data_files\": ", folder.string(),
                 " is not what datasets' save_to_disk leaves, or is empty");
  std::vector<fs::path> files;
  for (const auto& item : state["_data_files"]) {
    MOEGRAFT_CHECK(item.is_object() && item.contains("filename") && item["filename"].is_string(), file.string(),
                   ": an entry of \"_data_files\" has no \"filename\"");
    const fs::path name = item["filename"].get<std::string>();
    MOEGRAFT_CHECK(!name.empty() && name == name.filename(), file.string(), ": \"", shortened(name.string()),
                   "\" must be a file of this folder");
    files.push_back(folder / name);
  }
  return files;
}

std::vector<std::string> splits_of_dict(const fs::path& folder) {
  const Json dict = read_json(folder / "dataset_dict.json");
  std::vector<std::string> splits;
  if (dict.is_object() && dict.contains("splits") && dict["splits"].is_array())
    for (const auto& name : dict["splits"])
      if (name.is_string()) splits.push_back(shortened(name.get<std::string>(), 40));
  return splits;
}

}  // namespace moegraft::io
