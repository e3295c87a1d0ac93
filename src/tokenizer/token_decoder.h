#pragma once
// tokenizer.json decoders: token strings to text. Each step maps a list of strings to a list of strings; the last list
// is concatenated.

#include <memory>
#include <string>
#include <vector>

#include "field.h"

namespace moegraft::tokenizer {

class TokenDecoder {
 public:
  virtual ~TokenDecoder() = default;
  // UserError when the tokens together outgrow `limit` bytes at any step (growth_limit).
  virtual std::vector<std::string> apply(std::vector<std::string> tokens, size_t limit) const = 0;
};

std::unique_ptr<TokenDecoder> make_token_decoder(const Field& field);

}  // namespace moegraft::tokenizer
