#include "token_decoder.h"

#include <functional>
#include <optional>

#include "byte_level.h"
#include "normalizer.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

using Tokens = std::vector<std::string>;

class Function : public TokenDecoder {
 public:
  using F = std::function<Tokens(Tokens, size_t)>;
  explicit Function(F f) : f_(std::move(f)) {}
  Tokens apply(Tokens tokens, size_t limit) const override { return f_(std::move(tokens), limit); }

 private:
  F f_;
};

class Sequence : public TokenDecoder {
 public:
  explicit Sequence(const Field& field) {
    for (const auto& item : field.at("decoders").items()) steps_.push_back(make_token_decoder(item));
  }
  Tokens apply(Tokens tokens, size_t limit) const override {
    for (const auto& step : steps_) tokens = step->apply(std::move(tokens), limit);
    return tokens;
  }

 private:
  std::vector<std::unique_ptr<TokenDecoder>> steps_;
};

Tokens byte_level(Tokens tokens) {
  std::string bytes;
  for (const auto& token : tokens) {
    std::string mapped;
    bool all = true;
    for (size_t i = 0; i < token.size() && all;) {
      const int byte = byte_of_char(next_code_point(token, i));
      all = byte >= 0;
      mapped += static_cast<char>(byte);
    }
    bytes += all ? mapped : token;  // an added token outside the byte alphabet stands for itself
  }
  return {valid_utf8(bytes)};
}

std::optional<char> byte_token(const std::string& token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
  };
  const int high = digit(token[3]), low = digit(token[4]);
  if (low < 0 || (high < 0 && token[3] != '+')) return std::nullopt;  // Rust's from_str_radix takes a plus sign
  return static_cast<char>(high < 0 ? low : high * 16 + low);
}

Tokens byte_fallback(Tokens tokens) {
  Tokens out;
  std::string bytes;
  const auto flush = [&] {
    if (is_valid_utf8(bytes)) {
      if (!bytes.empty()) out.push_back(bytes);
    } else {
      out.insert(out.end(), bytes.size(), "\xEF\xBF\xBD");
    }
    bytes.clear();
  };
  for (auto& token : tokens) {
    if (const auto byte = byte_token(token)) {
      bytes += *byte;
    } else {
      flush();
      out.push_back(std::move(token));
    }
  }
  flush();
  return out;
}

Tokens fuse(Tokens tokens) {
  std::string all;
  for (const auto& token : tokens) all += token;
  return {all};
}

std::string strip(const std::string& token, const std::string& content, int64_t start, int64_t stop) {
  std::string_view rest = token;
  for (; start > 0 && rest.starts_with(content); --start) rest.remove_prefix(content.size());
  for (; stop > 0 && rest.ends_with(content); --stop) rest.remove_suffix(content.size());
  return std::string(rest);
}

std::string one_char(const Field& field, const char* key, const char* otherwise) {
  std::string c = field.string_or(key, otherwise);
  field.expect(!c.empty() && utf8_length(static_cast<unsigned char>(c[0])) == c.size(),
               std::string("'") + key + "' to be one character");
  return c;
}

std::string replaced(const std::string& text, const std::string& from, const std::string& to) {
  std::string out;
  size_t last = 0;
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, last)) {
    out += text.substr(last, at - last) + to;
    last = at + from.size();
  }
  return out + text.substr(last);
}

}  // namespace

std::unique_ptr<TokenDecoder> make_token_decoder(const Field& field) {
  const std::string type = field.type();
  // None of these makes a text longer.
  const auto function = [](auto f) {
    return std::make_unique<Function>([f](Tokens tokens, size_t) { return f(std::move(tokens)); });
  };
  const auto each = [&](auto f) {
    return function([f](Tokens tokens) {
      for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = f(tokens[i], i, tokens.size());
      return tokens;
    });
  };
  if (type == "Sequence") return std::make_unique<Sequence>(field);
  if (type == "ByteLevel") return function(byte_level);
  if (type == "ByteFallback") return function(byte_fallback);
  if (type == "Fuse") return function(fuse);
  if (type == "Strip") {
    const std::string content = one_char(field, "content", " ");
    const int64_t start = field.at("start").integer(0, 1 << 30), stop = field.at("stop").integer(0, 1 << 30);
    return each([=](const std::string& token, size_t, size_t) { return strip(token, content, start, stop); });
  }
  if (type == "Replace") {
    auto replacer = std::make_shared<Replacer>(field);
    return std::make_unique<Function>([replacer](Tokens tokens, size_t limit) {
      size_t total = 0;
      for (auto& token : tokens) {
        token = replacer->apply(token, limit);
        check_growth(total += token.size(), limit);
      }
      return tokens;
    });
  }
  if (type == "Metaspace") {
    const std::string mark = one_char(field, "replacement", "\xE2\x96\x81");
    const bool drop_first =
        field.string_or("prepend_scheme", field.boolean_or("add_prefix_space", true) ? "always" : "never") != "never";
    return each([=](const std::string& token, size_t i, size_t) {
      return replaced(token, mark, i == 0 && drop_first ? "" : " ");
    });
  }
  if (type == "BPEDecoder") {
    const std::string suffix = field.string_or("suffix", "</w>");
    field.expect(!suffix.empty(), "a suffix that is not empty");
    return each(
        [=](const std::string& token, size_t i, size_t n) { return replaced(token, suffix, i + 1 == n ? "" : " "); });
  }
  field.unsupported("decoder", "ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace, BPEDecoder, Sequence");
}

}  // namespace moegraft::tokenizer
