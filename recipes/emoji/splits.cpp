#include "emoji/splits.h"

#include <algorithm>
#include <array>
#include <map>
#include <string_view>

#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"

namespace moegraft::emoji {
namespace {

// Names a newcomer would try first.
constexpr std::array<std::string_view, 96> kWellKnown = {"red heart",
                                                         "grinning face",
                                                         "pizza",
                                                         "dog face",
                                                         "cat face",
                                                         "banana",
                                                         "blue heart",
                                                         "rose",
                                                         "automobile",
                                                         "sun",
                                                         "ghost",
                                                         "strawberry",
                                                         "fish",
                                                         "thumbs up",
                                                         "airplane",
                                                         "guitar",
                                                         "soccer ball",
                                                         "key",
                                                         "crown",
                                                         "umbrella",
                                                         "crying face",
                                                         "green heart",
                                                         "yellow heart",
                                                         "purple heart",
                                                         "smiling face with sunglasses",
                                                         "face with tears of joy",
                                                         "angry face",
                                                         "red apple",
                                                         "green apple",
                                                         "watermelon",
                                                         "grapes",
                                                         "cherries",
                                                         "lemon",
                                                         "hamburger",
                                                         "hot beverage",
                                                         "birthday cake",
                                                         "ice cream",
                                                         "doughnut",
                                                         "cookie",
                                                         "dog",
                                                         "cat",
                                                         "mouse face",
                                                         "rabbit face",
                                                         "fox",
                                                         "bear",
                                                         "panda",
                                                         "tiger face",
                                                         "lion",
                                                         "cow face",
                                                         "pig face",
                                                         "frog",
                                                         "monkey face",
                                                         "chicken",
                                                         "penguin",
                                                         "owl",
                                                         "butterfly",
                                                         "honeybee",
                                                         "turtle",
                                                         "octopus",
                                                         "dolphin",
                                                         "elephant",
                                                         "horse face",
                                                         "unicorn",
                                                         "sunflower",
                                                         "tulip",
                                                         "cactus",
                                                         "palm tree",
                                                         "evergreen tree",
                                                         "four leaf clover",
                                                         "mushroom",
                                                         "fire",
                                                         "star",
                                                         "rainbow",
                                                         "snowman",
                                                         "snowflake",
                                                         "high voltage",
                                                         "full moon",
                                                         "crescent moon",
                                                         "rocket",
                                                         "bicycle",
                                                         "locomotive",
                                                         "sailboat",
                                                         "house",
                                                         "basketball",
                                                         "trophy",
                                                         "gem stone",
                                                         "balloon",
                                                         "wrapped gift",
                                                         "books",
                                                         "alarm clock",
                                                         "light bulb",
                                                         "hammer",
                                                         "bomb",
                                                         "skull",
                                                         "robot",
                                                         "jack-o-lantern"};

constexpr std::array<std::string_view, 9> kColours = {"red",    "orange", "yellow", "green", "blue",
                                                      "purple", "brown",  "black",  "white"};

// "blue heart" -> "heart"; empty when the name is not a colour and a thing.
std::string coloured_thing(const std::string& name) {
  const size_t blank = name.find(' ');
  if (blank == std::string::npos ||
      std::find(kColours.begin(), kColours.end(), name.substr(0, blank)) == kColours.end())
    return {};
  return name.substr(blank + 1);
}

// Holds out about one member in four (at least one) of each group that keeps two or more for training.
void hold_out_members(const std::vector<EmojiEntry>& entries, const std::map<std::string, std::vector<int64_t>>& groups,
                      size_t smallest, uint64_t seed, std::string_view purpose, std::vector<EmojiSplit>& splits) {
  for (const auto& [group, members] : groups) {
    if (members.size() < smallest) continue;
    const int64_t wanted = static_cast<int64_t>(members.size() + 1) / 4;
    Rng rng(seed, purpose, hash_text(group));
    int64_t held = 0;
    for (int64_t i : rng.permutation(static_cast<int64_t>(members.size()))) {
      const int64_t member = members[i];
      if (held == std::max<int64_t>(1, wanted)) break;
      if (well_known_rank(entries[member].name) >= 0) continue;
      splits[member] = EmojiSplit::composition;
      ++held;
    }
  }
}

bool is_sign(char32_t c) {
  return (c >= 0x1F100 && c <= 0x1F2FF) || (c >= 0x2190 && c <= 0x21FF) || (c >= 0x2B00 && c <= 0x2B4F) ||
         (c >= 0x2648 && c <= 0x2653) || (c >= 0x1F550 && c <= 0x1F567) || (c >= 0x1F500 && c <= 0x1F506) ||
         (c >= 0x1F518 && c <= 0x1F524) || (c >= 0x25A0 && c <= 0x25FF) || (c >= 0x2460 && c <= 0x24FF) ||
         (c >= 0x3000 && c <= 0x32FF) || (c >= 0x1F9B0 && c <= 0x1F9B3) || c < 0x2000;
}

bool is_short_and_plain(const EmojiEntry& entry) {
  if (entry.code_points.size() != 1 || is_sign(entry.code_points[0])) return false;
  if (entry.name.find_first_of(":()") != std::string::npos || split(entry.name, ' ').size() > 3) return false;
  for (const auto& word : split(entry.name, ' '))
    for (std::string_view sign :
         {"button", "symbol", "sign", "arrow", "mark", "no", "square", "circle", "japanese", "keycap"})
      if (word == sign) return false;
  return true;
}

}  // namespace

uint64_t hash_text(std::string_view text) {  // FNV-1a
  uint64_t hash = 14695981039346656037ULL;
  for (unsigned char c : text) hash = (hash ^ c) * 1099511628211ULL;
  return hash;
}

int64_t well_known_rank(const std::string& name) {
  const auto found = std::find(kWellKnown.begin(), kWellKnown.end(), name);
  return found == kWellKnown.end() ? -1 : found - kWellKnown.begin();
}

std::vector<EmojiSplit> split_emoji(const std::vector<EmojiEntry>& entries, double holdout, uint64_t seed) {
  std::vector<EmojiSplit> splits(entries.size(), EmojiSplit::train);
  std::map<std::string, bool> well_known_concept;
  for (const auto& entry : entries) well_known_concept[entry.concept_name] |= well_known_rank(entry.name) >= 0;
  std::map<std::string, std::vector<int64_t>> toned, coloured;
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& entry = entries[i];
    const std::string thing = coloured_thing(entry.name);
    if (!thing.empty()) coloured[thing].push_back(static_cast<int64_t>(i));
  }
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& entry = entries[i];
    const std::string thing = coloured_thing(entry.name);
    const bool in_colour_group = !thing.empty() && coloured[thing].size() >= 3;
    if (!in_colour_group && !well_known_concept[entry.concept_name] &&
        Rng(seed, "emoji.holdout", hash_text(entry.concept_name)).uniform() < holdout)
      splits[i] = EmojiSplit::heldout;
    else if (entry.name != entry.concept_name)
      toned[entry.concept_name].push_back(static_cast<int64_t>(i));
  }
  if (holdout > 0) {
    hold_out_members(entries, toned, 3, seed, "emoji.tone", splits);
    hold_out_members(entries, coloured, 3, seed, "emoji.colour", splits);
  }
  return splits;
}

std::vector<int64_t> popular_emoji(const std::vector<EmojiEntry>& entries, const std::vector<EmojiSplit>& splits,
                                   int64_t count, uint64_t seed) {
  std::vector<std::pair<int64_t, int64_t>> known;
  std::vector<int64_t> others, chosen;
  std::map<std::string, int64_t> names;
  for (const auto& entry : entries) ++names[entry.name];
  for (size_t i = 0; i < entries.size(); ++i) {
    if (splits[i] != EmojiSplit::train) continue;
    const int64_t rank = well_known_rank(entries[i].name);
    if (rank >= 0)
      known.emplace_back(rank, i);
    else if (is_short_and_plain(entries[i]) && names[entries[i].name] == 1)
      others.push_back(static_cast<int64_t>(i));
  }
  std::sort(known.begin(), known.end());
  for (const auto& [rank, i] : known) chosen.push_back(i);
  for (int64_t i : Rng(seed, "emoji.popular").permutation(static_cast<int64_t>(others.size())))
    chosen.push_back(others[i]);
  if (static_cast<int64_t>(chosen.size()) > count) chosen.resize(std::max<int64_t>(0, count));
  return chosen;
}

}  // namespace moegraft::emoji
