#include <algorithm>
#include <cstdio>
#include <map>
#include <pugixml.hpp>
#include <set>

#include "data/emoji_probes.h"
#include "data/unicode.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/data/emoji.h"

namespace moegraft::data {
namespace {

bool is_skin_tone(char32_t c) { return c >= 0x1F3FB && c <= 0x1F3FF; }

void read_annotation_file(const std::filesystem::path& path, std::map<std::u32string, EmojiEntry>& entries) {
  MOEGRAFT_CHECK(std::filesystem::is_regular_file(path), "CLDR annotations not found: ", path.string(), " (Debian: apt install unicode-cldr-core)");
  pugi::xml_document document;
  const auto result = document.load_file(path.c_str());
  MOEGRAFT_CHECK(result, path.string(), " is not well-formed XML at byte ", result.offset, ": ", result.description());
  for (const auto& node : document.child("ldml").child("annotations").children("annotation")) {
    const std::string utf8 = node.attribute("cp").value();
    std::u32string code_points;
    for (char32_t c : to_code_points(utf8))
      if (c != 0xFE0F) code_points.push_back(c);
    if (code_points.empty()) continue;
    auto& entry = entries[code_points];
    entry.code_points = code_points;
    entry.utf8 = utf8;
    if (std::string_view(node.attribute("type").value()) == "tts") {
      entry.name = plain_lower(node.child_value());
    } else {
      for (const auto& keyword : split(node.child_value(), '|')) entry.keywords.push_back(plain_lower(keyword));
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
  std::vector<std::string> captions;
  std::set<std::string> seen;
  auto add = [&](const std::string& caption) {
    if (seen.insert(caption).second) captions.push_back(caption);
  };
  std::string phrase = entry.name;  // "waving hand: dark skin tone" reads "waving hand with dark skin tone"
  if (const size_t colon = phrase.find(": "); colon != std::string::npos && phrase.find("skin tone") != std::string::npos) phrase.replace(colon, 2, " with ");
  add(entry.name);
  add(phrase);
  // Several forms, so that what stands around a name is learnt to be no part of it.
  for (const char* sentence : {"a picture of ", "an emoji: ", "draw ", "a small image that shows ", "this is "}) add(sentence + phrase);
  add(phrase + ", drawn");
  add("what " + phrase + " looks like");
  std::vector<std::string> others;
  for (const auto& keyword : entry.keywords)
    if (keyword != entry.name && !shares_word(keyword, withheld)) others.push_back(keyword);
  if (!others.empty()) {
    add(join(others, ", "));
    add(phrase + ", " + join(others, ", "));
    std::reverse(others.begin(), others.end());
    add(join(others, " "));
    for (size_t i = 0; i + 1 < others.size() && i < 3 && others.size() > 2; ++i) add(others[i] + ", " + others[i + 1]);
    for (size_t i = 0; i < others.size() && i < 3; ++i) add(phrase + " (" + others[i] + ")");
  }
  return captions;
}

}  // namespace moegraft::data
