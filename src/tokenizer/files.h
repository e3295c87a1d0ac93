#pragma once
// File access of this module: io would pull LibTorch in.

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace moegraft::tokenizer {

std::string read_file(const std::filesystem::path& path);
// (name, bytes) into `dir`: all under temporary names first, so that a full disk leaves what was there.
void write_files(const std::filesystem::path& dir, const std::vector<std::pair<std::string, std::string>>& files);
nlohmann::json read_json(const std::filesystem::path& path);

// tokenizer_config.json beside a tokenizer; an empty object when there is none.
nlohmann::json read_tokenizer_config(const std::filesystem::path& dir);
// A token field of tokenizer_config.json: a string, or an object with "content"; empty when absent or null.
std::string token_content(const nlohmann::json& config, const char* key);

}  // namespace moegraft::tokenizer
