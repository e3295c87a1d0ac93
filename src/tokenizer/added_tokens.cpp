#include "added_tokens.h"

#include <algorithm>
#include <limits>

#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

size_t leading_space(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    size_t next = i;
    if (!is_white_space(next_code_point(text, next))) break;
    i = next;
  }
  return i;
}

size_t last_char(std::string_view text) {
  size_t i = text.size();
  while (i > 0 && (static_cast<unsigned char>(text[--i]) & 0xC0) == 0x80) {}
  return i;
}

size_t trailing_space_start(std::string_view text) {
  while (!text.empty()) {
    size_t start = last_char(text);
    size_t offset = start;
    if (!is_white_space(next_code_point(text, offset))) break;
    text = text.substr(0, start);
  }
  return text.size();
}

}  // namespace

AddedToken read_added_token(const Field& field, int64_t id) {
  return {.id = id,
          .content = field.at("content").string(),
          .special = field.boolean_or("special", false),
          .normalized = field.boolean_or("normalized", !field.boolean_or("special", false)),
          .single_word = field.boolean_or("single_word", false),
          .lstrip = field.boolean_or("lstrip", false),
          .rstrip = field.boolean_or("rstrip", false)};
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Normalizer* normalizer)
    : tokens_(std::move(tokens)), normalizer_(normalizer), word_("[" + std::string(kRustWord) + "]", "added tokens") {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const auto& token = tokens_[i];
    const std::string text = token.normalized && normalizer_ ? normalizer_->apply(token.content) : token.content;
    if (text.empty()) continue;
    auto& patterns = token.normalized ? normalized_ : raw_;
    (token.normalized ? has_normalized_ : has_raw_) = true;
    patterns[static_cast<unsigned char>(text[0])].push_back({text, i});
  }
  for (auto* patterns : {&raw_, &normalized_}) {
    for (auto& bucket : *patterns) {
      std::stable_sort(bucket.begin(), bucket.end(),
                       [](const Pattern& a, const Pattern& b) { return a.text.size() > b.text.size(); });
    }
  }
}

bool AddedTokens::starts_with_word(std::string_view text) const {
  bool found = false;
  const size_t length = text.empty() ? 0 : utf8_length(static_cast<unsigned char>(text[0]));
  word_.find_all(text.substr(0, length), [&](size_t, size_t) { found = true; });
  return found;
}

bool AddedTokens::ends_with_word(std::string_view text) const { return starts_with_word(text.substr(last_char(text))); }

void AddedTokens::find(const Patterns& patterns, std::string_view text, const Emit& emit) const {
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    const auto& bucket = patterns[static_cast<unsigned char>(text[i])];
    const auto it = std::find_if(bucket.begin(), bucket.end(),
                                 [&](const Pattern& p) { return text.substr(i).starts_with(p.text); });
    if (it == bucket.end()) {
      ++i;
      continue;
    }
    const AddedToken& token = tokens_[it->token];
    size_t begin = i, end = i + it->text.size();
    i = end;
    if (token.single_word && (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end)))) continue;
    if (token.lstrip) begin = std::max(trailing_space_start(text.substr(0, begin)), done);
    if (token.rstrip) end += leading_space(text.substr(end));
    if (begin > done) emit(nullptr, done, begin);
    emit(&token, begin, end);
    done = end;
  }
  if (done < text.size()) emit(nullptr, done, text.size());
}

void AddedTokens::split(std::string_view text, const std::function<void(int64_t)>& token,
                        const std::function<void(std::string, bool)>& plain) const {
  const Emit normalised_part = [&](const AddedToken* found, size_t begin, size_t end) {
    if (found) {
      token(found->id);
      return;
    }
    const std::string normal = normalizer_ ? normalizer_->apply(std::string(text.substr(begin, end - begin)))
                                           : std::string(text.substr(begin, end - begin));
    const bool at_start = begin == 0;
    if (!has_normalized_) {
      if (!normal.empty()) plain(normal, at_start);
      return;
    }
    find(normalized_, normal, [&](const AddedToken* inner, size_t first, size_t last) {
      if (inner)
        token(inner->id);
      else
        plain(normal.substr(first, last - first), at_start && first == 0);
    });
  };
  if (has_raw_)
    find(raw_, text, normalised_part);
  else if (!text.empty())
    normalised_part(nullptr, 0, text.size());
}

}  // namespace moegraft::tokenizer
