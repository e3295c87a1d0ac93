#pragma once
// What data was made with, and which data it is, as 16 hex digits each: compared by whoever relies on it being the
// same.

#include <filesystem>
#include <string>

#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::data {

// Of what it does: its pieces and how it cuts a text that is meant to tell tokenizers apart. tokenizer.json and
// tokenizer.model of one tokenizer agree.
std::string tokenizer_fingerprint(const tokenizer::Tokenizer& tokenizer);
// Of a codec's config and weights. UserError when the folder has none.
std::string codec_fingerprint(const std::filesystem::path& dir);
// Of a base's config and weights.
std::string base_fingerprint(const std::filesystem::path& dir);
// Of a shard or a folder of shards.
std::string source_fingerprint(const std::filesystem::path& path);

}  // namespace moegraft::data
