#pragma once

#include <filesystem>
#include <memory>

#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::tokenizer {

// file: a sentencepiece model (protobuf). tokenizer_config.json beside it says whether BOS and EOS are added.
std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file);

}  // namespace moegraft::tokenizer
