#include "normalizer.h"

#include <functional>
#include <vector>

#include "byte_level.h"
#include "moegraft/base/check.h"
#include "regex.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

// Normal forms make a text eighteen times as long at most, bytes twice: what grows more is no tokenizer, and would take all memory.
void check_growth(size_t before, size_t after) {
  MOEGRAFT_CHECK(after <= (size_t{1} << 16) + 64 * before, "the tokenizer's normalizer or decoder makes more than ", after, " bytes of ", before, ": damaged or hostile tokenizer.json");
}

class Function : public Normalizer {
 public:
  explicit Function(std::function<std::string(std::string)> f) : f_(std::move(f)) {}
  std::string apply(std::string text) const override { return f_(std::move(text)); }

 private:
  std::function<std::string(std::string)> f_;
};

class Sequence : public Normalizer {
 public:
  explicit Sequence(const Field& field) {
    for (const auto& item : field.at("normalizers").items()) steps_.push_back(make_normalizer(item));
  }
  std::string apply(std::string text) const override {
    const size_t before = text.size();
    for (const auto& step : steps_) {
      text = step->apply(std::move(text));
      check_growth(before, text.size());
    }
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

std::string Replacer::apply(std::string_view text) const {
  std::string out;
  size_t last = 0;
  const auto replace = [&](size_t begin, size_t end) {
    out += text.substr(last, begin - last);
    out += content_;
    last = end;
    check_growth(text.size(), out.size());
  };
  if (regex_) {
    regex_->find_all(text, replace);
  } else if (!literal_.empty()) {
    for (size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, last)) replace(at, at + literal_.size());
  }
  out += text.substr(last);
  return out;
}

std::unique_ptr<Normalizer> make_normalizer(const Field& field) {
  const std::string type = field.type();
  const auto function = [](auto f) { return std::make_unique<Function>(std::move(f)); };
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
    return function([prefix = field.at("prepend").string()](std::string text) {
      check_growth(text.size(), text.size() + prefix.size());
      return text.empty() ? text : prefix + text;
    });
  }
  if (type == "Replace") {
    auto replacer = std::make_shared<Replacer>(field);
    return function([replacer](std::string text) { return replacer->apply(text); });
  }
  field.unsupported("normalizer", "NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Prepend, Replace, ByteLevel, Sequence");
}

}  // namespace moegraft::tokenizer
