#pragma once
// tokenizer.json normalizers: text to text, before pre-tokenisation.

#include <memory>
#include <string>
#include <string_view>

#include "field.h"

namespace moegraft::tokenizer {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual std::string apply(std::string text) const = 0;
};

std::unique_ptr<Normalizer> make_normalizer(const Field& field);

// Replaces each match of a tokenizer.json pattern ({"String": …} or {"Regex": …}).
class Replacer {
 public:
  explicit Replacer(const Field& field);  // an object with pattern and content
  ~Replacer();
  Replacer(Replacer&&) noexcept;
  std::string apply(std::string_view text) const;

 private:
  std::string literal_, content_;
  std::unique_ptr<class Regex> regex_;
};

}  // namespace moegraft::tokenizer
