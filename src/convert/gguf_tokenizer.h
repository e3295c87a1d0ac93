#pragma once
// The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json.

#include <optional>

#include "moegraft/convert/gguf.h"
#include "moegraft/io/json.h"

namespace moegraft::convert {

struct GgufTokenizer {
  nlohmann::ordered_json tokenizer, config;
};
// tokenizer.ggml.model "gpt2" (byte-level BPE, its pre-tokenizer by tokenizer.ggml.pre) or "llama" (sentencepiece BPE
// with scores). None where the file has no tokenizer. UserError names what is unknown, with what is known.
std::optional<GgufTokenizer> read_gguf_tokenizer(const GgufFile& file);

}  // namespace moegraft::convert
