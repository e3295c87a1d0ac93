#include "emoji/probes.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "emoji/splits.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"
#include "moegraft/data/unicode.h"
#include "moegraft/io/files.h"

namespace moegraft::emoji {
namespace {

constexpr size_t kKeywords = 2;  // of a paraphrase: one alone ("fruit") often means many pictures
constexpr double kShare = 1.0 / 3;

// "{}" is the name.
constexpr std::array<std::string_view, 6> kSentences = {
    "could you paint {} for me?", "can i see {} please", "i would like to have {} here",
    "here we have got {}",        "look at {}",          "{} as a tiny icon"};

}  // namespace

std::set<std::string> word_set(const std::string& text) {
  const auto words = words_of(text);
  return {words.begin(), words.end()};
}

bool shares_word(const std::string& text, const std::set<std::string>& words) {
  const auto mine = words_of(text);
  return std::any_of(mine.begin(), mine.end(), [&](const std::string& word) { return words.contains(word); });
}

std::map<std::string, std::string> read_synonyms(const std::filesystem::path& path) {
  MOEGRAFT_CHECK_USAGE(std::filesystem::is_regular_file(path), "file of synonyms not found: ", path.string());
  std::istringstream file(io::read_file(path));
  std::map<std::string, std::string> synonyms;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    if (++number == 1 && line.starts_with("\xEF\xBB\xBF")) line.erase(0, 3);  // a byte-order mark
    line = trim(line);
    if (line.empty() || line[0] == '#') continue;
    const size_t tab = line.find('\t');
    const std::string name = data::plain_lower(line.substr(0, tab)),
                      other = tab == std::string::npos ? "" : data::plain_lower(line.substr(tab + 1));
    MOEGRAFT_CHECK(!name.empty() && !other.empty() && other.find('\t') == std::string::npos &&
                       line.find('\r') == std::string::npos,
                   path.string(), ":", number, ": expected \"name<TAB>other words\", got \"", shortened(line), "\"");
    MOEGRAFT_CHECK(!shares_word(other, word_set(name)), path.string(), ":", number, ": \"", other,
                   "\" shares a word with its name \"", name, "\"");
    MOEGRAFT_CHECK(synonyms.emplace(name, other).second, path.string(), ":", number, ": \"", name, "\" comes twice");
  }
  return synonyms;
}

std::map<std::string, int64_t> count_keywords(const std::vector<EmojiEntry>& entries) {
  std::map<std::string, int64_t> uses;
  for (const auto& entry : entries)
    for (const auto& keyword : entry.keywords) ++uses[keyword];
  return uses;
}

std::vector<std::string> paraphrase(const EmojiEntry& entry, const std::map<std::string, int64_t>& uses,
                                    uint64_t seed) {
  if (Rng(seed, "emoji.paraphrase", hash_text(entry.name)).uniform() >= kShare) return {};
  const auto name = word_set(entry.name);
  std::vector<std::pair<int64_t, std::string>> candidates;
  for (const auto& keyword : entry.keywords) {
    const auto found = uses.find(keyword);
    const int64_t elsewhere = found == uses.end() ? 0 : found->second - 1;
    if (!words_of(keyword).empty() && !shares_word(keyword, name))
      candidates.emplace_back(elsewhere > 0 ? elsewhere : INT64_MAX, keyword);
  }
  std::sort(candidates.begin(), candidates.end());
  std::vector<std::string> chosen;
  for (const auto& [rank, keyword] : candidates)
    if (chosen.size() < kKeywords) chosen.push_back(keyword);
  return chosen;
}

std::string in_new_sentence(const std::string& name, int64_t index) {
  std::string sentence(kSentences[static_cast<size_t>(index) % kSentences.size()]);
  return sentence.replace(sentence.find("{}"), 2, name);
}

}  // namespace moegraft::emoji
