#pragma once
// Tokens found in the text as they stand, before anything else looks at it: special ones ("<|im_end|>") and plain ones
// (runs of spaces in GPT-NeoX).

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe.h"
#include "field.h"
#include "normalizer.h"
#include "regex.h"

namespace moegraft::tokenizer {

struct AddedToken {
  int64_t id = 0;
  std::string content;
  bool special = false, normalized = false, single_word = false, lstrip = false, rstrip = false;
};

AddedToken read_added_token(const Field& field, int64_t id);

class AddedTokens {
 public:
  // normalizer may be null; it applies to the text, and to tokens with `normalized`.
  AddedTokens(std::vector<AddedToken> tokens, const Normalizer* normalizer);

  // Cuts the text: token(id) for an added token, plain(text, at_start) for normalised text between them (never empty).
  void split(std::string_view text, const std::function<void(int64_t)>& token,
             const std::function<void(std::string, bool)>& plain) const;
  const std::vector<AddedToken>& tokens() const { return tokens_; }

 private:
  struct Pattern {
    std::string text;
    size_t token;
  };
  using Patterns = std::array<std::vector<Pattern>, 256>;  // by first byte, longest first
  using Emit = std::function<void(const AddedToken*, size_t, size_t)>;
  void find(const Patterns& patterns, std::string_view text, const Emit& emit) const;
  bool ends_with_word(std::string_view text) const;
  bool starts_with_word(std::string_view text) const;

  std::vector<AddedToken> tokens_;
  const Normalizer* normalizer_;
  Patterns raw_, normalized_;
  bool has_raw_ = false, has_normalized_ = false;
  Regex word_;
};

}  // namespace moegraft::tokenizer
