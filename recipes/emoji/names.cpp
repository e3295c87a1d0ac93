#include <algorithm>
#include <cctype>
#include <cstdio>
#include <map>
#include <pugixml.hpp>
#include <set>

#include "emoji/emoji.h"
#include "emoji/probes.h"
#include "emoji/splits.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"
#include "moegraft/data/unicode.h"

namespace moegraft::emoji {
namespace {

bool is_skin_tone(char32_t c) { return c >= 0x1F3FB && c <= 0x1F3FF; }

void read_annotation_file(const std::filesystem::path& path, std::map<std::u32string, EmojiEntry>& entries) {
  MOEGRAFT_CHECK(std::filesystem::is_regular_file(path), "CLDR annotations not found: ", path.string(),
                 " (Debian: apt install unicode-cldr-core)");
  pugi::xml_document document;
  const auto result = document.load_file(path.c_str());
  MOEGRAFT_CHECK(result, path.string(), " is not well-formed XML at byte ", result.offset, ": ", result.description());
  for (const auto& node : document.child("ldml").child("annotations").children("annotation")) {
    const std::string utf8 = node.attribute("cp").value();
    std::u32string code_points;
    for (char32_t c : data::to_code_points(utf8))
      if (c != 0xFE0F) code_points.push_back(c);
    if (code_points.empty()) continue;
    auto& entry = entries[code_points];
    entry.code_points = code_points;
    entry.utf8 = utf8;
    if (std::string_view(node.attribute("type").value()) == "tts") {
      entry.name = data::plain_lower(node.child_value());
    } else {
      for (const auto& keyword : split(node.child_value(), '|')) entry.keywords.push_back(data::plain_lower(keyword));
    }
  }
}

// "man: medium skin tone, red hair" -> "man: red hair"; "waving hand: dark skin tone" -> "waving hand".
std::string without_skin_tones(const std::string& name) {
  const size_t colon = name.find(": ");
  if (colon == std::string::npos) return name;
  std::vector<std::string> kept;
  for (const auto& part : split(name.substr(colon + 2), ',')) {
    const std::string word = trim(part);
    if (!word.ends_with("skin tone")) kept.push_back(word);
  }
  return kept.empty() ? name.substr(0, colon) : name.substr(0, colon + 2) + join(kept, ", ");
}

// As sentences take it: "waving hand: dark skin tone" reads "waving hand with dark skin tone".
std::string phrase_of(const std::string& name) {
  std::string phrase = name;
  if (const size_t colon = phrase.find(": ");
      colon != std::string::npos && phrase.find("skin tone") != std::string::npos)
    phrase.replace(colon, 2, " with ");
  return phrase;
}

// Those that a caption may hold beside the name.
std::vector<std::string> other_keywords(const EmojiEntry& entry, const std::set<std::string>& withheld) {
  std::vector<std::string> others;
  for (const auto& keyword : entry.keywords)
    if (keyword != entry.name && !shares_word(keyword, withheld)) others.push_back(keyword);
  return others;
}

// Captions in the order they are made, each once.
class Captions {
 public:
  void add(const std::string& caption) {
    if (seen_.insert(caption).second) list_.push_back(caption);
  }
  std::vector<std::string> take() { return std::move(list_); }

 private:
  std::vector<std::string> list_;
  std::set<std::string> seen_;
};

constexpr int kInText = 10, kKeywordSets = 6;
constexpr uint64_t kMostBeside = 8, kMostInSet = 3;

}  // namespace

std::string EmojiEntry::file_stem() const {
  std::string stem;
  for (char32_t c : code_points) {
    char hex[12];
    std::snprintf(hex, sizeof hex, "%s%x", stem.empty() ? "" : "-", static_cast<unsigned>(c));
    stem += hex;
  }
  return stem;
}

std::vector<EmojiEntry> read_emoji_annotations(const std::filesystem::path& root, const std::string& language) {
  std::map<std::u32string, EmojiEntry> entries;
  read_annotation_file(root / "annotations" / (language + ".xml"), entries);
  read_annotation_file(root / "annotationsDerived" / (language + ".xml"), entries);
  std::vector<EmojiEntry> out;
  for (auto& [code_points, entry] : entries) {
    // Punctuation and lone skin-tone swatches are annotated too; below U+00A9 nothing is a picture, keycaps excepted.
    const bool lone_swatch = code_points.size() == 1 && is_skin_tone(code_points[0]);
    const bool plain_character = code_points.size() == 1 && code_points[0] < 0xA9;
    if (entry.name.empty() || lone_swatch || plain_character) continue;
    entry.concept_name = without_skin_tones(entry.name);
    out.push_back(std::move(entry));
  }
  return out;
}

std::vector<std::string> emoji_captions(const EmojiEntry& entry, const std::set<std::string>& withheld) {
  Captions captions;
  const std::string phrase = phrase_of(entry.name);
  captions.add(entry.name);
  captions.add(phrase);
  // Several forms, so that what stands around a name is learnt to be no part of it.
  for (const char* sentence : {"a picture of ", "an emoji: ", "draw ", "a small image that shows ", "this is "})
    captions.add(sentence + phrase);
  captions.add(phrase + ", drawn");
  captions.add("what " + phrase + " looks like");
  std::vector<std::string> others = other_keywords(entry, withheld);
  if (!others.empty()) {
    captions.add(join(others, ", "));
    captions.add(phrase + ", " + join(others, ", "));
    std::reverse(others.begin(), others.end());
    captions.add(join(others, " "));
    for (size_t i = 0; i + 1 < others.size() && i < 3 && others.size() > 2; ++i)
      captions.add(others[i] + ", " + others[i + 1]);
    for (size_t i = 0; i < others.size() && i < 3; ++i) captions.add(phrase + " (" + others[i] + ")");
  }
  return captions.take();
}

std::vector<std::string> captions_in_text(const EmojiEntry& entry, const std::set<std::string>& withheld,
                                          const std::vector<std::string>& lines, uint64_t seed) {
  Rng rng(seed, "emoji.captions", hash_text(entry.name));
  Captions captions;
  const auto plain = [](const std::string& word) {
    return std::all_of(word.begin(), word.end(),
                       [](unsigned char c) { return std::isalnum(c) || c >= 0x80 || c == '-' || c == '\''; });
  };
  for (int i = 0; i < kInText && !lines.empty(); ++i) {
    const auto words = split(lines[rng.below(lines.size())], ' ');
    const uint64_t length = 1 + rng.below(std::min<uint64_t>(kMostBeside, words.size())),
                   first = rng.below(words.size() - length + 1), place = rng.below(length + 1);
    std::vector<std::string> text(words.begin() + static_cast<int64_t>(first),
                                  words.begin() + static_cast<int64_t>(first + length));
    std::erase_if(text,
                  [&](const std::string& word) { return word.empty() || !plain(word) || shares_word(word, withheld); });
    text.insert(text.begin() + static_cast<int64_t>(std::min<uint64_t>(place, text.size())), phrase_of(entry.name));
    captions.add(join(text, " "));
  }
  const auto others = other_keywords(entry, withheld);
  for (int i = 0; i < kKeywordSets && !others.empty(); ++i) {
    std::vector<std::string> set;
    for (const int64_t k : rng.permutation(static_cast<int64_t>(others.size()))) set.push_back(others[k]);
    set.resize(std::min<uint64_t>(set.size(), 1 + rng.below(kMostInSet)));
    captions.add(join(set, rng.below(2) == 0 ? ", " : " "));
  }
  return captions.take();
}

}  // namespace moegraft::emoji
