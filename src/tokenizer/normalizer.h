#pragma once
// tokenizer.json normalizers: text to text, before pre-tokenisation.

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "field.h"

namespace moegraft::tokenizer {

// How long what a pipeline makes of a text may become: Replace and Prepend multiply when they are chained. Real ones
// stay below 3 times.
constexpr size_t growth_limit(size_t bytes) { return 4096 + 64 * bytes; }
void check_growth(size_t bytes, size_t limit);  // UserError above the limit

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  std::string apply(std::string text) const {
    const size_t limit = growth_limit(text.size());
    return apply(std::move(text), limit);
  }
  // UserError when the text outgrows `limit` bytes at any step.
  virtual std::string apply(std::string text, size_t limit) const = 0;
};

std::unique_ptr<Normalizer> make_normalizer(const Field& field);

// Replaces each match of a tokenizer.json pattern ({"String": …} or {"Regex": …}).
class Replacer {
 public:
  explicit Replacer(const Field& field);  // an object with pattern and content
  ~Replacer();
  Replacer(Replacer&&) noexcept;
  std::string apply(std::string_view text, size_t limit) const;  // UserError when the result outgrows `limit` bytes

 private:
  std::string literal_, content_;
  std::unique_ptr<class Regex> regex_;
};

}  // namespace moegraft::tokenizer
