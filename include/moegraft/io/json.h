#pragma once
// JSON files with errors that name the file and the key. Private to .cpp files in practice: nlohmann/json is heavy.

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

namespace moegraft::io {

using Json = nlohmann::json;

Json read_json(const std::filesystem::path& path);                  // UserError with line/column on a syntax error
void write_json(const std::filesystem::path& path, const Json& j);  // atomic, indented

}  // namespace moegraft::io
