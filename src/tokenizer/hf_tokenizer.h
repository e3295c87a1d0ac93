#pragma once

#include <filesystem>
#include <memory>

#include "field.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::tokenizer {

// json: the parsed tokenizer.json with a BPE model; file: where it lies, for messages and for the files beside it that
// name BOS and EOS.
std::unique_ptr<Tokenizer> make_hf_tokenizer(const nlohmann::json& json, const std::filesystem::path& file);

}  // namespace moegraft::tokenizer
