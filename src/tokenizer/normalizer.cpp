#include "normalizer.h"

#include <functional>
#include <vector>

#include "byte_level.h"
#include "moegraft/base/check.h"
#include "regex.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

class Function : public Normalizer {
 public:
  using F = std::function<std::string(std::string, size_t)>;
  explicit Function(F f) : f_(std::move(f)) {}
  std::string apply(std::string text, size_t limit) const override {
    text = f_(std::move(text), limit);
    check_growth(text.size(), limit);
    return text;
  }

 private:
  F f_;
};

class Sequence : public Normalizer {
 public:
  explicit Sequence(const Field& field) {
    for (const auto& item : field.at("normalizers").items()) steps_.push_back(make_normalizer(item));
  }
  std::string apply(std::string text, size_t limit) const override {
    for (const auto& step : steps_) text = step->apply(std::move(text), limit);
    return text;
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> steps_;
};

std::string strip(std::string_view text, bool left, bool right) {
  size_t begin = text.size(), end = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    if (is_white_space(next_code_point(text, i))) continue;
    begin = std::min(begin, start);
    end = i;
  }
  if (begin >= end) return left || right ? std::string() : std::string(text);
  if (!left) begin = 0;
  if (!right) end = text.size();
  return std::string(text.substr(begin, end - begin));
}

}  // namespace

void check_growth(size_t bytes, size_t limit) {
  MOEGRAFT_CHECK(bytes <= limit, "the tokenizer makes more than ", limit,
                 " bytes of one piece of text: steps of tokenizer.json that add to it multiply each other");
}

Replacer::Replacer(const Field& field) : content_(field.at("content").string()) {
  const Field pattern = field.at("pattern");
  if (pattern.has("String")) {
    literal_ = pattern.at("String").string();
  } else {
    pattern.expect(pattern.has("Regex"), "{\"String\": …} or {\"Regex\": …}");
    regex_ = std::make_unique<Regex>(pattern.at("Regex").string(), pattern.place());
  }
}
Replacer::~Replacer() = default;
Replacer::Replacer(Replacer&&) noexcept = default;

std::string Replacer::apply(std::string_view text, size_t limit) const {
  std::string out;
  size_t last = 0;
  const auto replace = [&](size_t begin, size_t end) {
    out += text.substr(last, begin - last);
    out += content_;
    check_growth(out.size(), limit);
    last = end;
  };
  if (regex_) {
    regex_->find_all(text, replace);
  } else if (!literal_.empty()) {
    for (size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, last))
      replace(at, at + literal_.size());
  }
  out += text.substr(last);
  return out;
}

std::unique_ptr<Normalizer> make_normalizer(const Field& field) {
  const std::string type = field.type();
  const auto function = [](auto f) {
    return std::make_unique<Function>([f = std::move(f)](std::string text, size_t) { return f(std::move(text)); });
  };
  const auto form = [&](NormalForm f) { return function([f](std::string text) { return normalize(text, f); }); };
  if (type == "Sequence") return std::make_unique<Sequence>(field);
  if (type == "NFC") return form(NormalForm::nfc);
  if (type == "NFD") return form(NormalForm::nfd);
  if (type == "NFKC") return form(NormalForm::nfkc);
  if (type == "NFKD") return form(NormalForm::nfkd);
  if (type == "Lowercase") return function([](std::string text) { return lowercase(text); });
  if (type == "StripAccents") return function([](std::string text) { return strip_accents(text); });
  if (type == "ByteLevel") return function([](std::string text) { return bytes_to_chars(text); });
  if (type == "Strip") {
    const bool left = field.boolean_or("strip_left", true), right = field.boolean_or("strip_right", true);
    return function([=](std::string text) { return strip(text, left, right); });
  }
  if (type == "Prepend") {
    return std::make_unique<Function>([prefix = field.at("prepend").string()](std::string text, size_t limit) {
      if (text.empty()) return text;
      check_growth(prefix.size() + text.size(), limit);
      return prefix + text;
    });
  }
  if (type == "Replace") {
    auto replacer = std::make_shared<Replacer>(field);
    return std::make_unique<Function>(
        [replacer](std::string text, size_t limit) { return replacer->apply(text, limit); });
  }
  field.unsupported("normalizer",
                    "NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Prepend, Replace, ByteLevel, Sequence");
}

}  // namespace moegraft::tokenizer
