#include "pre_tokenizer.h"

#include <functional>
#include <utility>

#include "byte_level.h"
#include "normalizer.h"
#include "regex.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

// GPT-2's pattern, which ByteLevel with use_regex applies.
constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behaviour { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behaviour behaviour_of(const Field& field, const char* otherwise) {
  const std::string name = field.string_or("behavior", otherwise);
  if (name == "Removed") return Behaviour::removed;
  if (name == "Isolated") return Behaviour::isolated;
  if (name == "MergedWithPrevious") return Behaviour::merged_with_previous;
  if (name == "MergedWithNext") return Behaviour::merged_with_next;
  field.at("behavior")
      .expect(name == "Contiguous", "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
  return Behaviour::contiguous;
}

// The text cut into matches and what lies between them.
struct Cut {
  size_t begin, end;
  bool match;
};
using Cutter = std::function<void(std::string_view, std::vector<Cut>&)>;

Cutter by_regex(const std::string& pattern, const std::string& place) {
  auto regex = std::make_shared<Regex>(pattern, place);
  return [regex](std::string_view text, std::vector<Cut>& cuts) {
    size_t last = 0;
    regex->find_all(text, [&](size_t begin, size_t end) {
      if (begin > last) cuts.push_back({last, begin, false});
      cuts.push_back({begin, end, true});
      last = end;
    });
    if (last < text.size()) cuts.push_back({last, text.size(), false});
  };
}

template <class Predicate>
Cutter by_char(Predicate matches) {
  return [matches](std::string_view text, std::vector<Cut>& cuts) {
    size_t last = 0;
    for (size_t i = 0; i < text.size();) {
      const size_t begin = i;
      if (!matches(next_code_point(text, i))) continue;
      if (begin > last) cuts.push_back({last, begin, false});
      cuts.push_back({begin, i, true});
      last = i;
    }
    if (last < text.size()) cuts.push_back({last, text.size(), false});
  };
}

std::vector<Cut> join_cuts(std::vector<Cut> cuts, Behaviour behaviour) {
  if (behaviour == Behaviour::isolated) return cuts;
  std::vector<Cut> out;
  bool previous = false;
  if (behaviour == Behaviour::merged_with_next) {
    for (size_t i = cuts.size(); i-- > 0;) {
      if (cuts[i].match && !previous && !out.empty())
        out.back().begin = cuts[i].begin;
      else
        out.push_back(cuts[i]);
      previous = cuts[i].match;
    }
    return {out.rbegin(), out.rend()};
  }
  for (const Cut& cut : cuts) {
    if (behaviour == Behaviour::removed) {
      if (!cut.match) out.push_back(cut);
      continue;
    }
    const bool joins = behaviour == Behaviour::contiguous ? cut.match == previous : cut.match && !previous;
    if (joins && !out.empty())
      out.back().end = cut.end;
    else
      out.push_back(cut);
    previous = cut.match;
  }
  return out;
}

class Splitter : public PreTokenizer {
 public:
  Splitter(Cutter cutter, Behaviour behaviour, bool invert = false)
      : cutter_(std::move(cutter)), behaviour_(behaviour), invert_(invert) {}

  void apply(Words& words) const override {
    std::vector<Words::Range> ranges;
    std::vector<Cut> cuts;
    for (const auto& range : words.ranges) {
      cuts.clear();
      cutter_(words.view(range), cuts);
      if (invert_) {
        for (auto& cut : cuts) cut.match = !cut.match;
      }
      for (const auto& cut : join_cuts(std::move(cuts), behaviour_)) {
        if (cut.end > cut.begin)
          ranges.push_back({range.begin + cut.begin, range.begin + cut.end, range.at_start && cut.begin == 0});
      }
      cuts = {};
    }
    words.ranges = std::move(ranges);
  }

 private:
  Cutter cutter_;
  Behaviour behaviour_;
  bool invert_;
};

// Rewrites each word: f(word, at_start) → new text.
template <class F>
void rewrite(Words& words, F f) {
  Words out;
  out.limit = words.limit;
  out.text.reserve(words.text.size() * 3 / 2);
  for (const auto& range : words.ranges) {
    const size_t begin = out.text.size();
    out.text += f(words.view(range), range.at_start);
    check_growth(out.text.size(), out.limit);
    if (out.text.size() > begin) out.ranges.push_back({begin, out.text.size(), range.at_start});
  }
  words = std::move(out);
}

class ByteLevel : public PreTokenizer {
 public:
  explicit ByteLevel(const Field& field) : add_prefix_space_(field.boolean_or("add_prefix_space", true)) {
    if (field.boolean_or("use_regex", true))
      splitter_ = std::make_unique<Splitter>(by_regex(kGpt2, field.place()), Behaviour::isolated);
  }
  void apply(Words& words) const override {
    if (add_prefix_space_) {
      rewrite(words,
              [](std::string_view word, bool) { return (word.starts_with(' ') ? "" : " ") + std::string(word); });
    }
    if (splitter_) splitter_->apply(words);
    rewrite(words, [](std::string_view word, bool) { return bytes_to_chars(word); });
  }

 private:
  bool add_prefix_space_;
  std::unique_ptr<Splitter> splitter_;
};

class Metaspace : public PreTokenizer {
 public:
  explicit Metaspace(const Field& field) : replacement_(field.string_or("replacement", "\xE2\x96\x81")) {
    field.expect(utf8_length(static_cast<unsigned char>(replacement_[0])) == replacement_.size(),
                 "a replacement of one character");
    const std::string scheme =
        field.string_or("prepend_scheme", field.boolean_or("add_prefix_space", true) ? "always" : "never");
    always_ = scheme == "always";
    first_ = scheme == "first";
    if (!always_ && !first_) field.at("prepend_scheme").expect(scheme == "never", "always, first or never");
    if (field.boolean_or("split", true)) {
      size_t offset = 0;
      const int32_t c = next_code_point(replacement_, offset);
      splitter_ = std::make_unique<Splitter>(by_char([c](int32_t x) { return x == c; }), Behaviour::merged_with_next);
    }
  }
  void apply(Words& words) const override {
    rewrite(words, [&](std::string_view word, bool at_start) {
      std::string out;
      if ((always_ || (first_ && at_start)) && !word.starts_with(' ') && !word.starts_with(replacement_))
        out = replacement_;
      for (const char c : word) {
        if (c == ' ')
          out += replacement_;
        else
          out += c;
      }
      return out;
    });
    if (splitter_) splitter_->apply(words);
  }

 private:
  std::string replacement_;
  bool always_ = false, first_ = false;
  std::unique_ptr<Splitter> splitter_;
};

class Sequence : public PreTokenizer {
 public:
  explicit Sequence(const Field& field) {
    for (const auto& item : field.at("pretokenizers").items()) steps_.push_back(make_pre_tokenizer(item));
  }
  void apply(Words& words) const override {
    for (const auto& step : steps_) step->apply(words);
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

std::unique_ptr<PreTokenizer> make_split(const Field& field) {
  const Field pattern = field.at("pattern");
  pattern.expect(pattern.value().is_object() && (pattern.has("String") || pattern.has("Regex")),
                 "{\"String\": …} or {\"Regex\": …}");
  const std::string source =
      pattern.has("String") ? regex_escape(pattern.at("String").string()) : pattern.at("Regex").string();
  return std::make_unique<Splitter>(by_regex(source, pattern.place()), behaviour_of(field, "Isolated"),
                                    field.boolean_or("invert", false));
}

}  // namespace

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Field& field) {
  const std::string type = field.type();
  if (type == "Sequence") return std::make_unique<Sequence>(field);
  if (type == "ByteLevel") return std::make_unique<ByteLevel>(field);
  if (type == "Split") return make_split(field);
  if (type == "Metaspace") return std::make_unique<Metaspace>(field);
  if (type == "Digits")
    return std::make_unique<Splitter>(by_char(is_numeric), field.boolean_or("individual_digits", false)
                                                               ? Behaviour::isolated
                                                               : Behaviour::contiguous);
  if (type == "Punctuation")
    return std::make_unique<Splitter>(by_char(is_punctuation), behaviour_of(field, "Isolated"));
  if (type == "Whitespace")
    return std::make_unique<Splitter>(
        by_regex("[" + std::string(kRustWord) + "]+|[^\\s" + kRustWord + "]+", field.place()), Behaviour::removed,
        true);
  if (type == "WhitespaceSplit") return std::make_unique<Splitter>(by_char(is_white_space), Behaviour::removed);
  if (type == "CharDelimiterSplit") {
    const std::string delimiter = field.at("delimiter").string();
    field.expect(!delimiter.empty() && utf8_length(static_cast<unsigned char>(delimiter[0])) == delimiter.size(),
                 "a delimiter of one character");
    return std::make_unique<Splitter>(by_regex(regex_escape(delimiter), field.place()), Behaviour::removed);
  }
  field.unsupported(
      "pre_tokenizer",
      "ByteLevel, Split, Metaspace, Digits, Punctuation, Whitespace, WhitespaceSplit, CharDelimiterSplit, Sequence");
}

}  // namespace moegraft::tokenizer
