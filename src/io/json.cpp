#include "moegraft/io/json.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"

namespace moegraft::io {

Json read_json(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  MOEGRAFT_CHECK(json_depth(text) <= kMostJsonDepth, path.string(), ": brackets nest ", json_depth(text),
                 " deep, expected ", kMostJsonDepth, " at most");
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    const size_t at = std::min<size_t>(error.byte > 0 ? error.byte - 1 : 0, text.size());
    const auto line = 1 + std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(at), '\n');
    const size_t line_start = at == 0 ? std::string::npos : text.rfind('\n', at - 1);
    const size_t column = line_start == std::string::npos ? at + 1 : at - line_start;
    // The library's text is "[json.exception...] parse error at line L, column C: <what>": keep only <what>.
    std::string what = error.what();
    if (const size_t cut = what.find(": "); cut != std::string::npos) what = what.substr(cut + 2);
    const bool pointer = text.starts_with("version https://git-lfs");
    fail(path.string(), ":", line, ":", column, ": not valid JSON: ",
         text.empty() ? "the file is empty"
         : pointer    ? "it is a git-lfs pointer: fetch the file itself with git lfs pull"
                      : what);
  } catch (const Json::exception& error) {  // a number out of range
    std::string what = error.what();
    if (const size_t cut = what.find("] "); cut != std::string::npos) what = what.substr(cut + 2);
    fail(path.string(), ": not valid JSON: ", shortened(what));
  }
}

void write_json(const std::filesystem::path& path, const Json& j) {
  // Invalid UTF-8 (from a user's file names or prompts) is replaced rather than losing the whole file.
  write_file_atomic(path, j.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace moegraft::io
