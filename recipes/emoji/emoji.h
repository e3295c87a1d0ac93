#pragma once
// The emoji data set: pictures of a colour-bitmap font (Noto Color Emoji) with CLDR names and keywords as captions.

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

namespace moegraft::emoji {

struct EmojiOptions {
  std::filesystem::path font = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf";
  std::filesystem::path annotations =
      "/usr/share/unicode/cldr/common";  // holds annotations/<language>.xml and annotationsDerived/<language>.xml
  std::string language = "en";
  std::filesystem::path synonyms;  // lines "name<TAB>other words"; empty: none
  std::filesystem::path
      running_text;  // lines of text: what trains is also described within pieces of it (captions_in_text); empty: not
  std::filesystem::path output;
  int64_t size = 36;      // pixels a side, on white
  int64_t limit = 0;      // 0: all; else the first so many, well-known ones first
  int64_t popular = 310;  // size of the small subset
  double holdout = 0.1;   // share of concepts held out
  uint64_t seed = 17;
};

struct EmojiSummary {
  int64_t pictures = 0, train = 0, heldout = 0, compositions = 0, popular = 0, without_glyph = 0;
  int64_t paraphrases = 0, synonyms = 0, templates = 0;  // probes of the popular ones
};

// One annotated emoji. name and keywords are lower-cased.
struct EmojiEntry {
  std::u32string code_points;  // without U+FE0F, as CLDR writes them
  std::string utf8, name;
  std::vector<std::string> keywords;
  std::string concept_name;       // the name without skin tones: what a hold-out keeps together
  std::string file_stem() const;  // "1f44d-1f3fd"
};

// Names and keywords in code point order. UserError: missing or malformed files.
std::vector<EmojiEntry> read_emoji_annotations(const std::filesystem::path& root, const std::string& language);

// How a picture may be described: the name first, then sentences and keyword lists made from the same words. Distinct.
// withheld: words of probes; keywords that hold one of them are left out.
std::vector<std::string> emoji_captions(const EmojiEntry& entry, const std::set<std::string>& withheld = {});

// More of them, by seed, so that names are found among other words and keywords in any company: the name at some place
// of up to eight words that follow each other in one of `lines` (words beside punctuation and withheld ones are not
// taken), and sets of up to three keywords. Distinct.
std::vector<std::string> captions_in_text(const EmojiEntry& entry, const std::set<std::string>& withheld,
                                          const std::vector<std::string>& lines, uint64_t seed);

// Writes <output>/images/*.png and manifests (see manifest.h): train.jsonl, heldout.jsonl (whole concepts),
// compositions.jsonl (skin tone × gesture and colour × thing combinations whose parts are in train.jsonl) and
// popular.jsonl (a subset of train.jsonl: single code points with short, distinct names); and probes, the popular ones
// in captions that are in no training manifest: paraphrases.jsonl (keywords) and synonyms.jsonl, whose words are in no
// training caption of their picture; templates.jsonl (the name in sentences of another form); german.jsonl and
// french.jsonl where CLDR has these languages. Deterministic in the options. UserError: missing files, a broken line of
// synonyms, nothing to write.
EmojiSummary prepare_emoji(const EmojiOptions& options);

}  // namespace moegraft::emoji
