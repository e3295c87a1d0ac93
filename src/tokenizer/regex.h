#pragma once
// Regular expressions of tokenizer.json. The `tokenizers` package runs them in Oniguruma (Ruby syntax); here PCRE2
// (UTF, JIT) runs a translation:
// \s, \w, \b, \h, \p{Script}, ^ and $, (?m), \uHHHH and `{n,m}+` mean different things in the two.
// A pattern comes from a file: what it may cost is bounded, in steps of one match, memory, and processor time over a
// text.

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace moegraft::tokenizer {

// The processor time that regular expressions may take on this thread while it lives: a second, and more for long
// texts. An outer one goes before an inner one.
class RegexBudget {
 public:
  explicit RegexBudget(size_t text_bytes);
  ~RegexBudget();
  RegexBudget(const RegexBudget&) = delete;
  RegexBudget& operator=(const RegexBudget&) = delete;

 private:
  bool outer_;
};

class Regex {
 public:
  // UserError naming `place` when the pattern does not compile or uses what has no translation (nested or intersected
  // character classes, \C, verbs (*...)).
  Regex(const std::string& pattern, const std::string& place);

  // Calls found(begin, end) for each match, left to right, non-overlapping. text: valid UTF-8. UserError when matching
  // takes longer than the budget (of its own, where there is no other), or far more steps than a text of its length
  // should.
  void find_all(std::string_view text, const std::function<void(size_t, size_t)>& found) const;

 private:
  std::shared_ptr<const void> code_;
  std::string place_;
};

// The members of a character class: \w of Rust's regex crate, which Whitespace and single_word use.
inline constexpr const char* kRustWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control})";

std::string regex_from_oniguruma(const std::string& pattern, const std::string& place);
std::string regex_escape(std::string_view literal);

}  // namespace moegraft::tokenizer
