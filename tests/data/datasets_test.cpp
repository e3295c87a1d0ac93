// Data sets as people have them (io/rows.h): the same documents, picture bytes and shards as the JSONL manifest of the
// same set; and damaged and hostile ones. tests/golden/make_datasets.py made the sets.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <functional>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/codec/pictures.h"
#include "moegraft/codec/vq.h"
#include "moegraft/data/manifest.h"
#include "moegraft/data/prepare.h"
#include "moegraft/io/files.h"
#include "moegraft/io/rows.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "tests_data.h"

namespace moegraft::data {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::Folder;
using test::write;

const fs::path kSets = fs::path(test_source_dir()) / "tests/golden/data/sets";

struct Kind {
  const char* path;
  bool needs_arrow;
};
const std::vector<Kind> kKinds = {{"set.tar", false},
                                  {"pax.tar", false},
                                  {"gnu.tar", false},
                                  {"set.tar.gz", false},
                                  {"set.tar.zst", false},
                                  {"shards-{000000..000001}.tar", false},
                                  {"set.parquet", true},
                                  {"stream.arrow", true},
                                  {"file.arrow", true},
                                  {"lz4.arrow", true},
                                  {"hub", true},
                                  {"saved", true},
                                  {"saved/data-0000{0,1}-of-00002.arrow", true}};

// What a document says, its pictures by their bytes.
std::string content_of(const ManifestEntry& entry) {
  std::string out;
  for (const auto& s : entry.segments) out += s.is_image() ? "[" + io::checksum_hex(s.image.read()) + "]" : s.text;
  for (const auto& caption : entry.captions) out += " | " + caption;
  return out;
}
std::vector<std::string> contents_of(const fs::path& manifest) {
  std::vector<std::string> out;
  for (const auto& entry : read_manifest(manifest)) out.push_back(content_of(entry));
  return out;
}

TEST(DataSets, EveryKindHoldsWhatTheManifestHolds) {
  const auto expected = contents_of(kSets / "set.jsonl");
  ASSERT_EQ(expected.size(), 5u);
  ASSERT_NE(expected[3].find(" | a red apple | an apple | a red thing"), std::string::npos) << expected[3];
  for (const auto& kind : kKinds)
    if (!kind.needs_arrow || io::reads_arrow()) { EXPECT_EQ(contents_of(kSets / kind.path), expected) << kind.path; }
  if (!io::reads_arrow()) GTEST_SKIP() << "built without Apache Arrow (tools/setup.sh --arrow)";
  for (const char* name : {"binary.parquet", "names.parquet"}) {
    const auto entries = read_manifest(kSets / name);
    ASSERT_EQ(entries.size(), 5u);
    for (size_t i = 0; i < 5; ++i)
      EXPECT_EQ(entries[i].segments[1].image.read(), io::read_file(kSets / ("images/" + std::to_string(i) + ".png")))
          << name;
  }
  for (const char* name : {"chat.parquet", "chat.arrow"})
    EXPECT_EQ(contents_of(kSets / name), contents_of(kSets / "chat.jsonl")) << name;
}

TEST(DataSets, PlacesAreNamedAndInOrder) {
  const auto entries = read_manifest(kSets / "set.tar");
  EXPECT_EQ(entries[2].segments[1].image.name(), (kSets / "set.tar").string() + ": train/0002.img.PNG");
  EXPECT_EQ(entries[4].line, 5);
  EXPECT_TRUE(entries[0].segments[1].image < entries[1].segments[1].image);
  EXPECT_EQ(read_manifest(kSets / "set.tar")[0].segments[1].image, entries[0].segments[1].image)
      << "read twice, it is one picture";
  if (!io::reads_arrow()) GTEST_SKIP() << "built without Apache Arrow (tools/setup.sh --arrow)";
  const auto rows = read_manifest(kSets / "set.parquet");
  EXPECT_EQ(rows[3].segments[1].image.name(), (kSets / "set.parquet").string() + ": row 3, image");
  // In any order, of two files by turns.
  const auto others = read_manifest(kSets / "stream.arrow");
  for (const size_t i : {4u, 0u, 3u, 1u, 2u, 2u})
    EXPECT_EQ(rows[i].segments[1].image.read(), others[i].segments[1].image.read()) << i;
}

TEST(ArrowFiles, RowGroupsLongerThanWhatIsDecodedAtATime) {
  if (!io::reads_arrow()) GTEST_SKIP() << "built without Apache Arrow (tools/setup.sh --arrow)";
  const auto entries = read_manifest(kSets / "long.parquet");
  ASSERT_EQ(entries.size(), 40u);
  for (const size_t i : {0u, 15u, 16u, 39u, 17u, 33u, 1u, 1u})
    EXPECT_EQ(entries[i].segments[1].image.read(), "picture " + std::to_string(i));
}

TEST(ArrowFiles, CellsAndColumnsThatHoldSomethingElse) {
  if (!io::reads_arrow()) GTEST_SKIP() << "built without Apache Arrow (tools/setup.sh --arrow)";
  std::vector<std::string> bad;
  const auto entries = read_manifest(kSets / "nulls.parquet", [&](const std::string& why) { bad.push_back(why); });
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_NE(error_of([&] {
              entries[0].segments[1].image.read();
            }).find("nulls.parquet: row 1, image: there is no picture in this cell"),
            std::string::npos);
  EXPECT_EQ(entries[1].segments[1].image.read(), io::read_file(kSets / "images/0.png"));
  ASSERT_EQ(bad.size(), 2u);
  EXPECT_NE(bad[0].find("nulls.parquet: row 0: the document's picture is missing: \"image\" is null"),
            std::string::npos)
      << bad[0];
  EXPECT_NE(bad[1].find("nulls.parquet: row 2: the picture has no text"), std::string::npos) << bad[1];
  EXPECT_NE(error_of([&] {
              read_manifest(kSets / "renamed.parquet");
            }).find("renamed.parquet: row 0: \"img\" holds a picture, which is read from \"image\""),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              read_manifest(kSets / "bare.parquet", [](const std::string&) {});
            }).find("column images is list<element: binary>, expected list<struct<bytes: binary, path: string>>"),
            std::string::npos)
      << error_of([&] { read_manifest(kSets / "bare.parquet", [](const std::string&) {}); });
}

TEST(ArrowFiles, EveryTypeOfColumn) {
  if (!io::reads_arrow()) GTEST_SKIP() << "built without Apache Arrow (tools/setup.sh --arrow)";
  struct Case {
    const char *name, *error;  // of each row; empty: it reads as the plain one does
  };
  const Case cases[] = {
      {"plain", ""},          {"large", ""},
      {"view", ""},           {"fixed", ""},
      {"dictionary", ""},     {"struct", ""},
      {"two_pictures", ""},   {"bytes_as_text", "\"text\" is a column of bytes, expected text: cast it to string"},
      {"number_as_text", ""}, {"map_as_captions", "\"captions\" must be a list of strings"}};
  for (const auto& c : cases)
    for (const char* ending : {".parquet", ".arrow"}) {
      SCOPED_TRACE(std::string(c.name) + ending);
      if (std::string_view(c.name) == "dictionary" && std::string_view(ending) == ".arrow") {
        EXPECT_NE(error_of([&] {
                    read_manifest(kSets / "types/dictionary.arrow");
                  }).find("holds dictionary-encoded columns in a stream, which are not read: write it as Parquet"),
                  std::string::npos);
        continue;
      }
      const bool number = std::string_view(c.name) == "number_as_text";
      const std::string expected = !number ? c.error
                                   : std::string_view(ending) == ".arrow"
                                       ? "\"text\" must be a string, got number"
                                       : "";  // Parquet's numbers are not decoded: the captions are left
      std::vector<std::string> bad;
      ::testing::internal::CaptureStderr();
      std::vector<ManifestEntry> entries;
      const auto error = error_of([&] {
        entries = read_manifest(kSets / "types" / (std::string(c.name) + ending),
                                [&](const std::string& why) { bad.push_back(why); });
      });
      const auto said = ::testing::internal::GetCapturedStderr();
      EXPECT_EQ(said.find("the pictures under \"mask\" are not read") != std::string::npos,
                std::string_view(c.name) == "two_pictures")
          << said;
      if (!expected.empty()) {
        ASSERT_EQ(bad.size(), 2u) << error;
        EXPECT_NE(bad[0].find(expected), std::string::npos) << bad[0];
        continue;
      }
      ASSERT_EQ(entries.size(), 2u) << error;
      EXPECT_EQ(entries[1].segments.back().image.read(), "picture 1");
      EXPECT_EQ(entries[1].captions, number ? (std::vector<std::string>{"three", "four"})
                                            : (std::vector<std::string>{"a cat", "three", "four"}));
    }
}

TEST(DataSets, TheSameShards) {
  Folder folder;
  std::string text;
  for (int i = 0; i < 200; ++i) text += "a red heart and a green apple, number " + std::to_string(i) + "\n";
  write(folder / "train.txt", text);
  tokenizer::SentencePieceTraining training;
  training.vocab_size = 300;
  tokenizer::train_sentencepiece({folder / "train.txt"}, folder / "tokenizer", training);
  codec::VqConfig config;
  config.image_size = 12, config.channels = {8, 8}, config.mixer_width = 8, config.mixer_blocks = 1,
  config.codebook_size = 16, config.code_width = 4;
  codec::VqCodec(config, 3).save(folder / "codec");
  const auto shards_of = [&](const std::string& kind) {
    ShardOptions options;
    options.tokenizer = folder / "tokenizer", options.codec = folder / "codec", options.output = folder / "shards",
    options.batch_size = 2, options.overwrite = true, options.strict = true;
    options.manifests = {kSets / kind}, options.captions = "all";
    EXPECT_EQ(prepare_shards(options).images, 5) << kind;
    std::string bytes;
    for (const auto& file : fs::directory_iterator(options.output)) bytes += io::read_file(file.path());
    return io::checksum_hex(bytes);
  };
  const auto expected = shards_of("set.jsonl");
  for (const auto& kind : kKinds)
    if (!kind.needs_arrow || io::reads_arrow()) { EXPECT_EQ(shards_of(kind.path), expected) << kind.path; }
}

TEST(DataSets, PicturesForACodec) {
  const auto expected = codec::load_pictures(kSets / "set.jsonl", 12, "pad");
  for (const auto& kind : kKinds) {
    if (kind.needs_arrow && !io::reads_arrow()) continue;
    const auto pictures = codec::load_pictures(kSets / kind.path, 12, "pad");
    EXPECT_EQ(pictures.skipped, 0) << kind.path;
    EXPECT_TRUE(at::equal(pictures.pixels_N3HW, expected.pixels_N3HW)) << kind.path;
  }
}

TEST(DataSets, FingerprintsCoverEveryByte) {
  Folder folder;
  for (const auto& kind : kKinds) EXPECT_EQ(io::fingerprint_rows(kSets / kind.path).size(), 16u) << kind.path;
  EXPECT_EQ(io::fingerprint_rows(kSets / "set.jsonl"), "");
  std::string bytes = io::read_file(kSets / "set.tar");
  write(folder / "tars/a.tar", bytes);
  const auto before = io::fingerprint_rows(folder / "tars");
  EXPECT_EQ(io::fingerprint_rows(folder / "tars/a.tar"), before);
  bytes[bytes.find("red heart")] = 'R';
  write(folder / "tars/a.tar", bytes);
  EXPECT_NE(io::fingerprint_rows(folder / "tars"), before);
}

TEST(DataSets, FoldersAndPatternsThatCouldMeanSeveralThings) {
  struct Case {
    std::vector<std::string> files;
    std::string path, expected;
  };
  const std::vector<Case> cases = {
      {{"d/data/train-00000-of-00001.parquet", "d/data/test-00000-of-00001.parquet"},
       "d",
       "holds the splits test, train, which do not belong together: name the files of one, such as "},
      {{"d/train-000.tar", "d/val-000.tar"}, "d", "holds the splits train, validation"},
      {{"d/beans-train.arrow", "d/beans-validation.arrow"}, "d", "holds the splits train, validation"},
      {{"d/a.tar", "d/b.parquet"}, "d", "holds tar and Parquet files"},
      {{"d/en/a.parquet", "d/de/a.parquet"},
       "d",
       "holds data sets (configurations or splits?): name one of them, such as "},
      {{"d/dataset_dict.json={\"splits\": [\"train\", \"test\"]}", "d/train/state.json"},
       "d",
       "holds the splits of a data set, train, test: name one of them, such as "},
      {{"d/state.json={\"_data_files\": [{\"filename\": \"../x.arrow\"}]}"}, "d", "must be a file of this folder"},
      {{"d/state.json={}"}, "d", "lists no \"_data_files\""},
      {{"d/train-00000-of-00002.parquet"},
       "d",
       "holds 1 of the 2 files train-?-of-00002.parquet that their names speak of"},
      {{"d/a.parquet", "d/data/b.parquet"}, "d", "holds data in itself and in data"},
      {{"d/a.parquet", "d/more/b.parquet"}, "d", "holds data in itself and in more"},
      {{"d/a.parquet", "d/b.parquet.incomplete"}, "d", "holds b.parquet.incomplete, a download that has not ended"},
      {{"d/a.parquet", "d/metadata.jsonl"}, "d", "holds metadata.jsonl and a.parquet: name the one that is meant"},
      {{"x-0.tar", "x-1.tar"}, "x-{0..3}.tar", "stands for 4 files, of which "},
      {{}, "x-{3..0}.tar", "{3..0} counts down"},
      {{}, "x-{0..3.tar", "a brace opens and never closes"},
      {{}, "x-{a}.tar", "is neither a range such as {000..123} nor a list"},
      {{}, "x-{0..99999999}.tar", "is more than 1000000 files"},
      {{}, "x-{0..9999}{0..9999}.tar", "is more than 1000000 files"},
      {{}, std::string(50, '{') + std::string(50, '}'), "is neither a range"},
      {{"x.jsonl.gz=\x1f\x8b\x08"}, "x.jsonl.gz", "is compressed, and neither a tar nor Parquet"}};
  for (const auto& c : cases) {
    Folder folder;
    for (const auto& file : c.files)
      write(folder / file.substr(0, file.find('=')),
            file.find('=') == std::string::npos ? "" : file.substr(file.find('=') + 1));
    const auto error = error_of([&] { read_manifest(folder / c.path, [](const std::string&) {}); });
    EXPECT_NE(error.find(c.expected), std::string::npos) << c.expected << " in: " << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
}

// A member of a tar as POSIX 1003.1-1988 (ustar) lays it out; `says` is the size in the header where that is another.
struct Member {
  std::string name, data;
  char type = '0';
  std::string link = {};
  int64_t says = -1;
};
std::string tar_of(const std::vector<Member>& members, bool end = true) {
  std::string out;
  for (const auto& m : members) {
    char header[512] = {};
    std::memcpy(header, m.name.data(), std::min<size_t>(m.name.size(), 100));
    std::snprintf(header + 100, 8, "%07o", 0644);
    std::snprintf(header + 108, 8, "%07o", 0);
    std::snprintf(header + 116, 8, "%07o", 0);
    std::snprintf(header + 124, 12, "%011llo",
                  static_cast<unsigned long long>(m.says >= 0 ? m.says : int64_t(m.data.size())));
    std::snprintf(header + 136, 12, "%011o", 0);
    std::memset(header + 148, ' ', 8);
    header[156] = m.type;
    std::memcpy(header + 157, m.link.data(), std::min<size_t>(m.link.size(), 100));
    std::memcpy(header + 257, "ustar\00000", 8);
    unsigned sum = 0;
    for (const char c : header) sum += static_cast<unsigned char>(c);
    std::snprintf(header + 148, 8, "%06o", sum);
    out.append(header, 512);
    out += m.data;
    out.resize((out.size() + 511) / 512 * 512);
  }
  return end ? out + std::string(1024, '\0') : out;
}

TEST(Tars, OneLineForEachBadSample) {
  struct Case {
    std::vector<Member> members;
    std::string expected;
  };
  const Member png{"b.png", "x"}, text{"b.txt", "words"};
  const std::vector<Case> cases = {
      {{{"a.png", "x"}}, "x.tar: a: the picture has no text"},
      {{{"a.txt", "t"}, {"a.cls", "3"}}, "x.tar: a: no picture among its files (.txt, .cls)"},
      {{{"a.png", "x"}, {"a.txt", ""}}, "x.tar: a: the picture has no text"},
      {{{"a.png", "x"}, {"a.txt", "\xe4 latin"}}, "its text is not UTF-8"},
      {{{"a.png", "x"}, {"a.json", "{"}}, "x.tar: a: not valid JSON"},
      {{{"a.png", "x"}, {"a.json", "[]"}}, "its .json must be a JSON object, got array"},
      {{{"a.png", "x"}, {"a.json", std::string(200, '[')}}, "nest too deep"},
      {{{"a.png", "x"}, {"a.json", "{\"captoin\": \"x\"}"}}, "did you mean \"caption"},
      {{{"a.png", "x"}, {"a.png", "y"}, {"a.txt", "t"}}, "x.tar: a: it has two files .png"},
      {{{"a.png", "x"}, png, text, {"a.txt", "t"}}, "x.tar: a: its files do not follow each other"},
      {{{"a.1.png", "x"}, {"a.2.png", "x"}, {"a.txt", "t"}}, "it has 2 pictures, and no .json"},
      {{{"a.png", "x"}, {"a.json", R"({"segments": [{"text": "t"}, {"image": "other.png"}]})"}},
       "image not found: other.png is not among the files of this key"},
      {{{"a.png", "x"}, {"a.json", R"({"segments": [{"text": "t"}, {"image": "/etc/hostname"}]})"}},
       "image not found: /etc/hostname"},
      {{{"../../a.png", "x"}, {"../../a.txt", "t"}}, "leads out of the tar"},
      {{{"/a.png", "x"}, {"/a.txt", "t"}}, "is an absolute path"},
      {{{"a.png", "", '2', "/etc/passwd"}, {"a.txt", "t"}}, "a.png is a link"},
      {{{"a.png", "", '1', "b.png"}, {"a.txt", "t"}}, "a.png is a link"},
      {{{"a.png", "", '3'}, {"a.txt", "t"}}, "a.png is a device or a pipe"},
      {{{"a.png", "", '6'}, {"a.txt", "t"}}, "a.png is a device or a pipe"},
      {{{"a.png", "x"}, {"a.txt", std::string((16 << 20) + 1, 't')}}, "at most 16777216 are read"}};
  for (const auto& c : cases) {
    Folder folder;
    auto members = c.members;
    if (std::none_of(members.begin(), members.end(), [&](const Member& m) { return m.name == "b.png"; }))
      members.insert(members.end(), {png, text});
    write(folder / "x.tar", tar_of(members));
    std::vector<std::string> bad;
    EXPECT_EQ(read_manifest(folder / "x.tar", [&](const std::string& why) { bad.push_back(why); }).size(), 1u)
        << c.expected;
    ASSERT_EQ(bad.size(), 1u) << c.expected;
    EXPECT_NE(bad[0].find(c.expected), std::string::npos) << c.expected << " in: " << bad[0];
    EXPECT_EQ(bad[0].find('\n'), std::string::npos) << bad[0];
    EXPECT_EQ(error_of([&] { read_manifest(folder / "x.tar"); }), bad[0]) << "--strict ends with the same line";
    EXPECT_EQ(std::distance(fs::directory_iterator(folder / ""), fs::directory_iterator()), 1) << "nothing is unpacked";
  }
}

TEST(Tars, DamageEndsTheJob) {
  const std::string whole =
      tar_of({{"a.png", std::string(3000, 'x')}, {"a.txt", "t"}, {"b.png", std::string(3000, 'y')}, {"b.txt", "t"}});
  const std::string gz = io::read_file(kSets / "set.tar.gz"), zst = io::read_file(kSets / "set.tar.zst");
  std::string broken = whole;
  broken[3584 + 20] = 'z';  // in the second header, whose sum is wrong then
  const std::vector<std::tuple<std::string, std::string, std::string>> cases = {
      {"x.tar", whole.substr(0, 2000),
       "x.tar is damaged or cut short at a.png, its member 1: it says 3000 bytes, 1488 are there; copy it again"},
      {"x.tar", whole.substr(0, 6000), "cut short at b.png"},
      {"x.tar", broken, "x.tar is damaged or cut short at a.png"},
      {"x.tar", tar_of({{"a.png", "x"}, {"a.txt", "t", '0', "", 1 << 30}}), "it says 1073741824 bytes"},
      {"x.tar", tar_of({{"a.png", "x", '0', "", int64_t{1} << 32}, {"a.txt", "t"}}), "it says 4294967296 bytes"},
      {"x.tar", tar_of({{"a.png", std::string(3000, 'x'), '0', "", 100}, {"a.txt", "t"}}),
       "is damaged or cut short at a.png"},
      {"x.tar", "", "is empty, expected a tar"},
      {"x.tar", std::string(2000, 'x'), "is no tar that can be read"},
      {"x.tar.gz", gz.substr(0, gz.size() / 2), "x.tar.gz is no tar that can be read: truncated gzip input"},
      {"x.tar.zst", zst.substr(0, zst.size() / 2), "x.tar.zst is"},
      {"none.tar", "", "cannot read "}};
  for (const auto& [name, bytes, expected] : cases) {
    Folder folder;
    if (name != "none.tar") write(folder / name, bytes);
    for (const bool strict : {false, true}) {
      const auto error = error_of([&] { read_manifest(folder / name, strict ? BadRow() : [](const std::string&) {}); });
      EXPECT_NE(error.find(expected), std::string::npos) << expected << " in: " << error;
      EXPECT_EQ(error.find('\n'), std::string::npos) << error;
    }
  }
  // Cut between two members: only the missing end mark tells.
  Folder folder;
  write(folder / "x.tar", tar_of({{"a.png", "x"}, {"a.txt", "t"}}, /*end=*/false));
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(read_manifest(folder / "x.tar").size(), 1u);
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("has no end mark behind its 2 members: it may be cut short"),
            std::string::npos);
}

TEST(DataSets, WhatLiesBesideIsSaidOnce) {
  Folder folder;
  write(folder / "d/x.tar", tar_of({{"a.png", "x"}, {"a.txt", "t"}}));
  write(folder / "d/notes.jsonl", "{}");
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(read_manifest(folder / "d").size(), 1u);
  const auto said = ::testing::internal::GetCapturedStderr();
  const size_t at = said.find("notes.jsonl is passed over beside the data files of its folder");
  EXPECT_NE(at, std::string::npos) << said;
  EXPECT_EQ(said.find("is passed over beside", at + 20), std::string::npos) << said;
}

TEST(Tars, JoinedTarsAreSaid) {
  Folder folder;
  const std::string one = tar_of({{"a.png", "x"}, {"a.txt", "t"}}) + std::string(8192, '\0'),
                    two = tar_of({{"b.png", "x"}, {"b.txt", "t"}});
  for (const auto& [bytes, said] : {std::pair(one, false), {one + two, true}}) {
    write(folder / "x.tar", bytes);
    ::testing::internal::CaptureStderr();
    EXPECT_EQ(read_manifest(folder / "x.tar").size(), 1u);
    EXPECT_EQ(::testing::internal::GetCapturedStderr().find("goes on behind its end mark") != std::string::npos, said);
  }
}

TEST(Tars, WhatIsPassedOverIsSaid) {
  Folder folder;
  write(folder / "x.tar", tar_of({{"__meta__/__info__", "x"},
                                  {"d/", "", '5'},
                                  {"README", "x"},
                                  {"d/.hidden", "x"},
                                  {"d/a.jpg", "x"},
                                  {"d/a.txt", "t"},
                                  {"d/a.npy", "x"},
                                  {"d/a.__key__", "x"}}));
  ::testing::internal::CaptureStderr();
  const auto entries = read_manifest(folder / "x.tar");
  const auto said = ::testing::internal::GetCapturedStderr();
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_EQ(entries[0].segments[1].image.read(), "x");
  EXPECT_NE(said.find(".__key__ (1), .npy (1), without an extension (2)"), std::string::npos) << said;
}

TEST(Tars, SeveralTextsAndNamedPictures) {
  Folder folder;
  write(folder / "x.tar",
        tar_of({{"a.left.png", "L"},
                {"a.right.png", "R"},
                {"a.json", R"({"segments": [{"image": "right.png"}, {"text": " or "}, {"image": "a.left.png"}]})"},
                {"b.png", "B"},
                {"b.txt", "one\n"},
                {"b.caption", "two"},
                {"b.json", R"({"caption": "three", "captions": ["one", "four"]})"},
                {"c.png", "C"},
                {"c.json",
                 R"({"image": "coco/17.jpg", "conversations": [{"value": "<image> what?"}, {"value": "a dog"}]})"},
                {"d.1.png", "1"},
                {"d.2.png", "2"},
                {"d.json", R"({"conversations": [{"value": "<image> and <image>"}]})"}}));
  const auto entries = read_manifest(folder / "x.tar");
  ASSERT_EQ(entries.size(), 4u);
  const auto shape = [](const ManifestEntry& entry) {
    std::string out;
    for (const auto& s : entry.segments) out += s.is_image() ? "[" + s.image.read() + "]" : s.text;
    return out;
  };
  EXPECT_EQ(shape(entries[0]), "[R] or [L]");
  EXPECT_EQ(shape(entries[1]), "one[B]");
  EXPECT_EQ(entries[1].captions, (std::vector<std::string>{"one", "two", "three", "four"}));
  EXPECT_EQ(shape(entries[2]), "[C] what?\na dog");
  EXPECT_EQ(shape(entries[3]), "[1] and [2]");
}

TEST(Tars, AChangedTarIsNotReadFurther) {
  Folder folder;
  write(folder / "x.tar", tar_of({{"a.png", "x"}, {"a.txt", "t"}}));
  const auto entries = read_manifest(folder / "x.tar");
  EXPECT_EQ(entries[0].segments[1].image.read(), "x");
  write(folder / "x.tar", tar_of({{"c.png", "zz"}, {"b.txt", "t"}, {"b.png", "y"}}));
  EXPECT_THROW(entries[0].segments[1].image.read(), io::SourceChanged);
  EXPECT_NE(error_of([&] { entries[0].segments[1].image.read(); }).find("was changed while it is in use"),
            std::string::npos);
  fs::remove(folder / "x.tar");
  EXPECT_THROW(entries[0].segments[1].image.read(), io::SourceChanged)
      << "the job ends: one picture after the other is not skipped";
}

// A pipe makes whoever opens it wait for ever.
TEST(DataSets, APipeIsRefusedAtOnce) {
  Folder folder;
  for (const char* name : {"x.tar", "x.parquet", "x.jsonl", "x.csv"}) {
    ASSERT_EQ(::mkfifo((folder / name).c_str(), 0600), 0);
    EXPECT_NE(error_of([&] { read_manifest(folder / name); }).find("is a pipe or a device, expected a file"),
              std::string::npos)
        << name;
  }
}

TEST(ArrowFiles, AStreamWithoutItsEndIsSaid) {
  if (!io::reads_arrow()) GTEST_SKIP() << "built without Apache Arrow (tools/setup.sh --arrow)";
  Folder folder;
  const std::string whole = io::read_file(kSets / "stream.arrow");
  for (const size_t cut : {0u, 8u}) {
    write(folder / "x.arrow", whole.substr(0, whole.size() - cut));
    ::testing::internal::CaptureStderr();
    EXPECT_EQ(read_manifest(folder / "x.arrow").size(), 5u);
    EXPECT_EQ(::testing::internal::GetCapturedStderr().find(
                  "x.arrow has no end mark behind its 3 batches: it may be cut short") != std::string::npos,
              cut > 0);
  }
}

TEST(ArrowFiles, DamagedOnesAreNamed) {
  if (!io::reads_arrow()) {
    for (const auto& [name, kind] : {std::pair("set.parquet", "a Parquet file"), {"stream.arrow", "an Arrow file"}}) {
      const auto error = error_of([&] { read_manifest(kSets / name); });
      EXPECT_NE(error.find(kind), std::string::npos) << error;
      EXPECT_NE(error.find("tools/setup.sh --arrow"), std::string::npos) << error;
    }
    return;
  }
  for (const char* name : {"set.parquet", "stream.arrow", "file.arrow", "lz4.arrow", "chat.parquet", "chat.arrow"}) {
    const std::string whole = io::read_file(kSets / name);
    const std::string ending = fs::path(name).extension().string();
    const auto read_all = [&](const std::string& bytes) {
      Folder folder;
      write(folder / ("x" + ending), bytes);
      return error_of([&] {
        for (const auto& entry : read_manifest(folder / ("x" + ending)))
          for (const auto& s : entry.segments)
            if (s.is_image()) s.image.read();
      });
    };
    EXPECT_EQ(read_all(whole), "") << name;
    EXPECT_NE(read_all("").find("x" + ending), std::string::npos) << name;
    for (size_t bytes = 1; bytes < whole.size() - 16; bytes += 37) {
      const auto error = read_all(whole.substr(0, bytes));
      const bool stream = ending == ".arrow" && std::string(name) != "file.arrow";  // may end behind any of its batches
      EXPECT_TRUE(stream || error.find("x" + ending) != std::string::npos) << name << " " << bytes << " " << error;
      EXPECT_EQ(error.find('\n'), std::string::npos) << error;
    }
    for (size_t at = 0; at < whole.size(); at += 7) {  // whatever it says, it does not crash
      std::string bytes = whole;
      bytes[at] = char(bytes[at] ^ 0x55);
      read_all(bytes);
    }
  }
}

}  // namespace
}  // namespace moegraft::data
