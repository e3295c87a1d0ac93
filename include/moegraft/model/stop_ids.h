#pragma once
// The ids that end a text.

#include <cstdint>
#include <filesystem>
#include <vector>

namespace moegraft::model {

// Every eos_token_id of config.json and of generation_config.json (a number or a list each), in that order, each once;
// empty without these files. UserError: a value that is neither.
std::vector<int64_t> read_eos_ids(const std::filesystem::path& dir);

}  // namespace moegraft::model
