#include "emoji/emoji.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>

#include "data/tests_data.h"
#include "emoji/corpus.h"
#include "emoji/probes.h"
#include "emoji/splits.h"
#include "moegraft/data/manifest.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"

namespace moegraft::emoji {
namespace {

using data::test::error_of;
using data::test::Folder;
using data::test::write;

std::vector<std::string> lines(const std::filesystem::path& path) {
  std::istringstream in(io::read_file(path));
  std::vector<std::string> out;
  for (std::string line; std::getline(in, line);) out.push_back(line);
  return out;
}

std::vector<EmojiEntry> some_emoji() {
  std::vector<EmojiEntry> entries;
  auto add = [&](const std::string& name, const std::string& concept_name) {
    EmojiEntry entry;
    entry.code_points = std::u32string(1, static_cast<char32_t>(0x1F900 + entries.size()));
    entry.name = name, entry.concept_name = concept_name;
    entries.push_back(entry);
  };
  for (int i = 0; i < 60; ++i) {
    const std::string name = "gesture " + std::to_string(i);
    add(name, name);
    for (const char* tone : {"light", "medium-light", "medium", "medium-dark", "dark"})
      add(name + ": " + tone + " skin tone", name);
  }
  for (const char* colour : {"red", "orange", "yellow", "green", "blue", "purple", "black", "white"})
    add(std::string(colour) + " heart", std::string(colour) + " heart");
  add("pizza", "pizza");
  return entries;
}

TEST(EmojiSplits, ConceptsAndCompositions) {
  const auto entries = some_emoji();
  const auto splits = split_emoji(entries, 0.2, 17);
  std::map<std::string, std::map<EmojiSplit, int>> by_concept;
  int held = 0, hearts_out = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    ++by_concept[entries[i].concept_name][splits[i]];
    if (entries[i].name.ends_with(" heart")) hearts_out += splits[i] == EmojiSplit::composition;
    if (well_known_rank(entries[i].name) >= 0) { EXPECT_EQ(splits[i], EmojiSplit::train) << entries[i].name; }
  }
  EXPECT_EQ(hearts_out, 2);
  for (const auto& [name, counts] : by_concept) {
    if (!name.starts_with("gesture")) continue;
    if (counts.contains(EmojiSplit::heldout)) {
      EXPECT_EQ(counts.size(), 1u) << "a held-out concept is held out as a whole";
      ++held;
    } else {
      EXPECT_EQ(counts.at(EmojiSplit::train), 5);
      EXPECT_EQ(counts.at(EmojiSplit::composition), 1);
    }
  }
  EXPECT_GT(held, 4);
  EXPECT_LT(held, 24);
  EXPECT_EQ(splits, split_emoji(entries, 0.2, 17));
  EXPECT_NE(splits, split_emoji(entries, 0.2, 18));
  // Another entry moves nobody.
  auto fewer = entries;
  fewer.erase(fewer.begin(), fewer.begin() + 6);
  const auto fewer_splits = split_emoji(fewer, 0.2, 17);
  EXPECT_TRUE(std::equal(fewer_splits.begin(), fewer_splits.end(), splits.begin() + 6));
  const auto popular = popular_emoji(entries, splits, 4, 17);
  ASSERT_EQ(popular.size(), 4u);
  EXPECT_EQ(entries[popular[0]].name, "red heart");
  EXPECT_EQ(entries[popular[1]].name, "pizza");
}

TEST(Emoji, SmallSetFromTheDebianPackages) {
  EmojiOptions options;
  if (!std::filesystem::exists(options.font) || !std::filesystem::exists(options.annotations))
    GTEST_SKIP() << "fonts-noto-color-emoji or unicode-cldr-core is not installed";
  Folder folder;
  options.output = folder / "emoji";
  options.limit = 60, options.popular = 30, options.size = 24;
  write(folder / "synonyms.tsv", "# other words\nDog Face\tpuppy\ncat face\tpet  kitten\nno such emoji\tnothing\n");
  options.synonyms = folder / "synonyms.tsv";
  write(folder / "text.txt", "\n  An old Puppy sleeps under (the) table beside a kitten\n");
  options.running_text = folder / "text.txt";
  const auto summary = prepare_emoji(options);
  EXPECT_EQ(summary.pictures, 60);
  EXPECT_EQ(summary.popular, 30);
  EXPECT_EQ(summary.train + summary.heldout + summary.compositions, 60);
  const auto entries = data::read_manifest(folder / "emoji/popular.jsonl");
  ASSERT_EQ(entries[0].captions[0], "red heart");
  // The probes: in captions that no training manifest holds, of words that no training caption of their picture holds.
  std::map<io::Picture, std::vector<std::string>> trained;
  for (const char* manifest : {"emoji/train.jsonl", "emoji/popular.jsonl"})
    for (const auto& entry : data::read_manifest(folder / manifest))
      trained[entry.segments[1].image].insert(trained[entry.segments[1].image].end(), entry.captions.begin(),
                                              entry.captions.end());
  for (const auto& [manifest, count] : {std::pair("emoji/paraphrases.jsonl", summary.paraphrases),
                                        {"emoji/synonyms.jsonl", summary.synonyms},
                                        {"emoji/templates.jsonl", summary.templates}}) {
    const auto probes = data::read_manifest(folder / manifest);
    EXPECT_EQ(int64_t(probes.size()), count) << manifest;
    ASSERT_GT(count, 1) << manifest;
    for (const auto& probe : probes) {
      ASSERT_TRUE(trained.contains(probe.segments[1].image)) << manifest;
      for (const auto& caption : trained.at(probe.segments[1].image)) {
        EXPECT_NE(caption, probe.captions[0]) << manifest;
        EXPECT_TRUE(std::string(manifest).find("templates") != std::string::npos ||
                    !shares_word(caption, word_set(probe.captions[0])))
            << manifest << ": " << caption << " | " << probe.captions[0];
      }
    }
  }
  EXPECT_EQ(summary.templates, summary.popular);
  // Only what trains is described in running text.
  const auto in_text = [&](const char* manifest) {
    int64_t count = 0;
    if (std::filesystem::file_size(folder / manifest) == 0) return count;
    for (const auto& entry : data::read_manifest(folder / manifest))
      for (const auto& caption : entry.captions)
        count += std::set<std::string>{"sleeps", "old", "beside"}.contains(caption.substr(0, caption.find(' '))) ||
                 caption.ends_with(" sleeps");
    return count;
  };
  EXPECT_GE(in_text("emoji/train.jsonl"), summary.train / 2);
  EXPECT_EQ(in_text("emoji/heldout.jsonl") + in_text("emoji/compositions.jsonl"), 0);
  EXPECT_EQ(data::read_manifest(folder / "emoji/german.jsonl")[0].captions[0], "rotes herz");
  EXPECT_EQ(data::read_manifest(folder / "emoji/french.jsonl")[0].captions[0], "cœur rouge");
  const auto heart = io::load_image(entries[0].segments[1].image);
  EXPECT_EQ(heart.sizes(), (at::IntArrayRef{3, 24, 24}));
  const auto centre = heart.slice(1, 9, 15).slice(2, 9, 15).to(at::kFloat).mean({1, 2});
  EXPECT_GT(centre[0].item<float>(), 180);  // red inside, white in the corner
  EXPECT_LT(centre[1].item<float>(), 90);
  EXPECT_EQ(heart.select(1, 0).select(1, 0).min().item<int>(), 255);
  options.running_text = folder / "none.txt";
  EXPECT_NE(error_of([&] { prepare_emoji(options); }).find("--running-text: no such file"), std::string::npos);
  options.running_text.clear();
  options.font = folder / "none.ttf";
  EXPECT_NE(error_of([&] { prepare_emoji(options); }).find("emoji font not found"), std::string::npos);
  write(folder / "text.ttf", "not a font");
  options.font = folder / "text.ttf";
  EXPECT_NE(error_of([&] { prepare_emoji(options); }).find("is not a font"), std::string::npos);
}

TEST(Emoji, CaptionsInRunningText) {
  EmojiEntry entry;
  entry.name = "waving hand: dark skin tone";
  entry.keywords = {"hello", "hand", "waving hand: dark skin tone", "good bye"};
  const std::vector<std::string> lines = {"one, two three four \"five\" six", "seven"};
  const auto captions = captions_in_text(entry, {"two", "bye"}, lines, 17);
  EXPECT_EQ(captions, captions_in_text(entry, {"two", "bye"}, lines, 17));
  EXPECT_NE(captions, captions_in_text(entry, {"two", "bye"}, lines, 18));
  std::set<std::string> within, sets;
  for (const auto& caption : captions) {
    auto& kind = caption.find("waving hand with dark skin tone") == std::string::npos ? sets : within;
    EXPECT_TRUE(kind.insert(caption).second) << caption;
    for (const char* never : {"two", "one,", "five", "bye", "  "})
      EXPECT_EQ(caption.find(never), std::string::npos) << caption;
  }
  EXPECT_GE(within.size(), 4u);
  EXPECT_TRUE(std::any_of(within.begin(), within.end(), [](const std::string& caption) {
    return !caption.starts_with("waving") && !caption.ends_with("tone");
  }));
  for (const auto& set : sets)
    EXPECT_TRUE((
        std::set<std::string>{"hello", "hand", "hello, hand", "hand, hello", "hello hand", "hand hello"}.contains(set)))
        << set;
  EXPECT_GE(sets.size(), 2u);
  EXPECT_TRUE(captions_in_text(EmojiEntry(), {}, {}, 17).empty());
}

TEST(Emoji, SynonymsNameTheBrokenLine) {
  Folder folder;
  for (const auto& [text, expected] : std::vector<std::pair<std::string, std::string>>{
           {"pizza", "expected \"name<TAB>other words\", got \"pizza\""},
           {"pizza\t", "expected \"name<TAB>"},
           {"red heart\tHeart of love", "shares a word with its name \"red heart\""},
           {"pizza\tflat cheese\npizza\tslice", "s.tsv:2: \"pizza\" comes twice"}}) {
    write(folder / "s.tsv", text);
    EXPECT_NE(error_of([&] { read_synonyms(folder / "s.tsv"); }).find(expected), std::string::npos)
        << error_of([&] { read_synonyms(folder / "s.tsv"); });
  }
  EXPECT_NE(error_of([&] { read_synonyms(folder / "none.tsv"); }).find("none.tsv"), std::string::npos);
}

TEST(Corpus, SmallWordNet) {
  Folder folder;
  const std::string licence = "  1 This software and database\n";
  for (const char* name : {"data.noun", "data.verb", "data.adj", "data.adv"}) {
    std::string text = licence;
    for (int i = 0; i < 25; ++i)
      text += "00001740 03 n 02 Physical_entity" + std::to_string(i) +
              " 0 thing(p) 0 001 ~ 00001930 n 0000 | that which is Known" + std::string(name).substr(5) +
              std::to_string(i) + "; \"an example\"  \n";
    write(folder / ("wn/" + std::string(name)), text);
  }
  write(
      folder / "cldr/annotations/en.xml",
      R"(<ldml><annotations><annotation cp="❤">heart | love</annotation><annotation cp="❤" type="tts">red heart</annotation>
      <annotation cp="{" type="tts">open brace</annotation></annotations></ldml>)");
  write(folder / "cldr/annotationsDerived/en.xml", "<ldml><annotations/></ldml>");
  CorpusOptions options;
  options.wordnet = folder / "wn", options.annotations = folder / "cldr", options.output = folder / "out",
  options.eval_share = 0.1;
  const auto summary = prepare_corpus(options);
  EXPECT_EQ(summary.train_documents, 90 + 6);
  EXPECT_EQ(summary.eval_documents, 10);
  auto train = lines(folder / "out/train.txt"), eval = lines(folder / "out/eval.txt");
  EXPECT_EQ(std::count(train.begin(), train.end(), "red heart: heart, love") +
                std::count(train.begin(), train.end(), "red heart: love, heart"),
            6);
  std::set<std::string> all(train.begin(), train.end());
  for (const auto& line : eval) EXPECT_TRUE(all.insert(line).second) << "held-out text is not trained on";
  EXPECT_TRUE(all.contains("physical entity3, thing: that which is knownverb3; \"an example\""));
  prepare_corpus(options);
  EXPECT_EQ(lines(folder / "out/train.txt"), train);
  write(folder / "wn/data.adj", licence + "rubbish\n");
  EXPECT_NE(error_of([&] { prepare_corpus(options); }).find("data.adj:2: not a WordNet synset line"),
            std::string::npos);
  std::filesystem::remove(folder / "wn/data.adj");
  EXPECT_NE(error_of([&] { prepare_corpus(options); }).find("WordNet not found"), std::string::npos);
}

}  // namespace
}  // namespace moegraft::emoji
