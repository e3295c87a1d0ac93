#include "moegraft/data/prepare.h"

#include <gtest/gtest.h>

#include <map>
#include <tuple>

#include "moegraft/base/check.h"
#include "moegraft/codec/vq.h"
#include "moegraft/data/fingerprints.h"
#include "moegraft/data/manifest.h"
#include "moegraft/data/shard.h"
#include "moegraft/data/unicode.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "tests_data.h"

namespace moegraft::data {
namespace {

using test::error_of;
using test::Folder;
using test::write;

TEST(Unicode, PlainLower) {
  EXPECT_EQ(plain_lower("  Piñata\u00a0 ÅLAND\tO’Clock “x” "), "piñata åland o'clock \"x\"");
  EXPECT_EQ(to_utf8(to_code_points("a👍é")), "a👍é");
  EXPECT_EQ(to_code_points("\xff"
                           "a"),
            U"\uFFFDa");
}

TEST(Manifest, EveryShape) {
  Folder folder;
  for (const char* name : {"a.png", "b.png", "c.png", "d.png", "e.png"}) write(folder / name, "");
  write(
      folder / "m.jsonl",
      R"({"image": "a.png", "text": "red heart", "captions": ["red heart", "love"], "keywords": ["x"]})"
      "\n\n"
      R"({"segments": [{"text": "look: "}, {"image": "b.png"}, {"text": "nice"}]})"
      "\n"
      R"({"image": "c.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]})"
      "\n"
      R"({"images": ["d.png", "e.png"], "conversations": [{"from": "human", "value": "1 <image> 2 <image>"}]})"
      "\n"
      R"({"text": "words"})"
      "\r\n"
      R"({"file_name": "a.png", "caption": "hugging face", "width": 12})"
      "\n"
      R"({"messages": [{"role": "user", "content": [{"type": "image", "path": "b.png"}, {"type": "text", "text": "what?"}]}, {"role": "assistant", "content": "a dog"}]})"
      "\n"
      R"({"images": ["c.png"], "messages": [{"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image"}]}]})"
      "\n"
      R"({"images": ["c.png"], "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a dog"}]})"
      "\n"
      R"({"image": "d.png", "messages": [{"role": "user", "content": "what?"}]})"
      "\n"
      R"({"image": null, "messages": [{"role": "user", "content": "no picture here"}]})"
      "\n"
      R"({"images": ["d.png", "e.png"], "text": "<image> beside <image>!"})"
      "\n"
      R"({"images": ["d.png"], "text": "dog"})"
      "\n"
      R"({"image": ["d.png", "e.png"], "caption": ["dogs", "two"]})"
      "\n"
      R"({"image": "a.png", "text": "x", "caption": "y", "captions": ["z"], "sentence": "s", "texts": "t", "image2": 3, "message": "m"})"
      "\n"
      R"({"text": "<image> is a tag of HTML"})"
      "\n"
      R"({"messages": [{"content": "words"}], "message": "m", "conversation": 3})"
      "\n"
      R"({"messages": [{"content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": " <image> is text here"}]}]})"
      "\n");
  const auto entries = read_manifest(folder / "m.jsonl");
  ASSERT_EQ(entries.size(), 18u);
  EXPECT_EQ(entries[0].captions, (std::vector<std::string>{"red heart", "love"}));
  auto shape = [&](const ManifestEntry& entry) {
    std::string out;
    for (const auto& s : entry.segments)
      out += s.is_image() ? "[" + std::filesystem::path(s.image.name()).filename().string() + "]" : s.text;
    return out;
  };
  EXPECT_EQ(shape(entries[0]), "red heart[a.png]");
  EXPECT_EQ(entries[0].segments[1].image.name(), (folder / "a.png").string());
  EXPECT_EQ(shape(entries[1]), "look: [b.png]nice");
  EXPECT_EQ(shape(entries[2]), "[c.png]\nwhat?\na dog");
  EXPECT_EQ(shape(entries[3]), "1 [d.png] 2 [e.png]");
  EXPECT_EQ(shape(entries[4]), "words");
  EXPECT_EQ(shape(entries[5]), "hugging face[a.png]");
  EXPECT_EQ(entries[5].captions, (std::vector<std::string>{"hugging face"}));
  EXPECT_EQ(shape(entries[6]), "[b.png]what?\na dog");
  EXPECT_EQ(shape(entries[7]), "see [c.png]");
  EXPECT_EQ(shape(entries[8]), "[c.png]what?\na dog");
  EXPECT_EQ(shape(entries[9]), "[d.png]what?");
  EXPECT_EQ(shape(entries[10]), "no picture here");
  EXPECT_EQ(shape(entries[11]), "[d.png] beside [e.png]!");
  EXPECT_EQ(shape(entries[12]), "dog[d.png]");
  EXPECT_EQ(shape(entries[13]), "dogs[d.png][e.png]");
  EXPECT_EQ(entries[13].captions, (std::vector<std::string>{"dogs", "two"}));
  EXPECT_EQ(entries[14].captions, (std::vector<std::string>{"x", "z", "y"}));
  EXPECT_EQ(shape(entries[15]), "<image> is a tag of HTML");
  EXPECT_EQ(shape(entries[16]), "words");
  EXPECT_EQ(shape(entries[17]), "[b.png] <image> is text here");
  EXPECT_EQ(entries[1].line, 3);
}

TEST(Manifest, ImageFolders) {
  Folder folder;
  for (const char* name : {"lines/a.png", "table/a.png", "table/b.png", "labels/cat/a.png", "labels/dog/b.JPG"})
    write(folder / name, "");
  write(folder / "lines/metadata.jsonl",
        "\xEF\xBB\xBF"
        R"({"file_name": "a.png", "text": "x"})");
  write(folder / "table/metadata.csv",
        "\xEF\xBB\xBF"
        "file_name,text\r\na.png,\"one, \"\"two\"\"\nthree\"\r\n\r\nb.png,y");
  EXPECT_EQ(read_manifest(folder / "lines").front().captions.front(), "x");
  const auto table = read_manifest(folder / "table");
  ASSERT_EQ(table.size(), 2u);
  EXPECT_EQ(table[0].captions.front(), "one, \"two\"\nthree");
  EXPECT_EQ(table[1].segments.back().image.name(), (folder / "table/b.png").string());
  const auto labels = read_manifest(folder / "labels");
  ASSERT_EQ(labels.size(), 2u);
  EXPECT_EQ(labels[0].captions.front(), "cat");
  EXPECT_EQ(labels[1].segments.back().image.name(), (folder / "labels/dog/b.JPG").string());
}

TEST(Manifest, FoldersThatAreNoImageFolder) {
  const std::vector<std::tuple<std::vector<std::string>, std::string>> cases = {
      {{"train/cat/a.png", "test/cat/b.png"},
       "holds ImageFolders (splits?), not a folder for each label: name one of them, such as "},
      {{"train/metadata.jsonl", "train/a.png"}, "holds ImageFolders (splits?)"},
      {{"cat/a.png", "loose.png"}, "the picture has no text"},
      {{"notes.txt"}, "has no document that can be read"}};
  for (const auto& [files, expected] : cases) {
    Folder folder;
    for (const auto& file : files) write(folder / ("d/" + file), "");
    const auto error = error_of([&] { read_manifest(folder / "d"); });
    EXPECT_NE(error.find(expected), std::string::npos) << expected << " in: " << error;
  }
  Folder folder;
  write(folder / "m.csv", "file_name,text\na.png,x\nb.png,\"never closed\nc.png,y\n");
  EXPECT_NE(error_of([&] {
              read_manifest(folder / "m.csv", [](const std::string&) {});
            }).find("m.csv:3: a quote opens in this row and never closes"),
            std::string::npos);
}

TEST(Manifest, NamesTheBrokenLine) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"text\": \"a\"}\n{\"text\":", "m.jsonl:2: not valid JSON"},
      {"7", "must be a JSON object, got number"},
      {"[{\"text\": \"a\"}]", "is one JSON list; one object a line is expected"},
      {"{\"title\": \"a\"}", "expected \"image\" and \"text\""},
      {"{\"text\": 3}", "\"text\" must be a string, got number"},
      {"{\"text\": \"\"}", "the document is empty"},
      {"{\"text\": \"half \\ud83d emoji\"}", "not valid JSON"},
      {"{\"text\": 1e999}", "not valid JSON"},
      {"{\"text\": " + std::string(200, '[') + std::string(200, ']') + "}", "nest too deep"},
      {"{\"image\": \"\"}", "an image path is empty"},
      {"{\"image\": \"a.png\"}", "the picture has no text"},
      {"{\"image\": \"a.png\", \"text\": \"\"}", "the picture has no text"},
      {"{\"image\": \"none.png\", \"text\": \"x\"}", "image not found"},
      {"{\"image\": \"data:image/png;base64," + std::string(5000, 'A') + "\", \"text\": \"x\"}",
       "is in the manifest itself"},
      {"{\"image\": \"https://example.org/a.png\", \"text\": \"x\"}", "is an address"},
      {"{\"imgae\": \"a.png\", \"text\": \"x\"}", "unknown key \"imgae\"; did you mean \"image\"?"},
      {"{\"image\": \"a.png\", \"captoin\": \"x\"}", "did you mean \"caption"},
      {"{\"img_path\": \"a.png\", \"text\": \"x\"}", "\"img_path\" holds a picture"},
      {"{\"segments\": [{\"sound\": \"a\"}]}", "a segment must be"},
      {"{\"image\": \"a.png\", \"conversations\": [{\"value\": \"<image><image>\"}]}",
       "2 places for pictures (<image>, or parts of type image), and 1 picture(s)"},
      {"{\"messages\": [{\"content\": [{\"type\": \"image\"}]}]}", "1 places for pictures"},
      {"{\"messages\": [{\"content\": \"<image>\"}]}", "1 places for pictures"},
      {"{\"messages\": [{\"content\": [{\"type\": \"image\", \"image\": \"\"}]}]}", "an image path is empty"},
      {"{\"messages\": [{\"content\": [{\"type\": \"audio\"}]}]}", "got the type audio"},
      {"{\"images\": [\"a.png\"], \"text\": \"<image> and <image>\"}", "2 places for pictures"},
      {"{\"images\": [\"a.png\"], \"text\": \"<image>\", \"captions\": [\"x\"]}",
       "\"captions\" do not go with a text that says where its pictures stand"},
      {"{\"image\": null, \"text\": \"x\"}", "the document's picture is missing: \"image\" is null"},
      {"{\"images\": [], \"text\": \"x\"}", "the document's picture is missing: \"images\" is []"},
      {"{\"images\": [null], \"text\": \"x\"}", "\"images\" must hold strings, got null"},
      {"{\"picture\": {\"path\": \"a.png\"}, \"text\": \"x\"}", "\"picture\" holds a picture"},
      {"{\"pictures\": [\"a.png\"], \"text\": \"x\"}", "\"pictures\" holds a picture"},
      {"{\"photo\": \"a.png\", \"messages\": [{\"content\": \"what is it?\"}]}", "\"photo\" holds a picture"},
      {"{\"url\": \"https://example.org/a.png\", \"text\": \"x\"}", "\"url\" is the address of a picture"},
      {"{\"image\": \"a.png\", \"segments\": [{\"text\": \"x\"}]}", "leave \"image\" out"},
      {"{\"segments\": [{\"text\": \"x\", \"images\": \"a.png\"}]}", "a segment holds a picture under \"images\""},
      {"{\"image\": \"a.png\", \"prompt\": \"x\"}", "the row has \"image\", \"prompt\""},
      {"{\"image\": \"a.png\", \"text\": \"x\", \"captoins\": [\"y\"]}", "did you mean \"captions\"?"},
      {"{\"image\": \"a.png\", \"test\": \"x\"}", "did you mean \"text\"?"},
      {"{\"image\": \"a.png\", \"captions\": \"a\"}", "\"captions\" must be a list"},
      {"\n", "has no document that can be read"}};
  Folder folder;
  write(folder / "a.png", "");
  for (const auto& [text, expected] : cases) {
    write(folder / "m.jsonl", text);
    const auto error = error_of([&] { read_manifest(folder / "m.jsonl"); });
    EXPECT_NE(error.find(expected), std::string::npos) << expected << " in: " << error;
    EXPECT_LT(error.size(), 400u) << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
  EXPECT_NE(error_of([&] { read_manifest(folder / "none.jsonl"); }).find("none.jsonl"), std::string::npos);
  EXPECT_NE(error_of([&] {
              read_manifest(folder / "set-0000.tar");
            }).find("cannot read " + (folder / "set-0000.tar").string()),
            std::string::npos);
}

TEST(Manifest, ColumnsByAnotherName) {
  Folder folder;
  write(folder / "a.png", ""), write(folder / "b.png", "");
  write(folder / "m.jsonl", R"({"jpg": "a.png", "en": "dog", "text": "Hund", "image": "b.png"})"
                            "\n"
                            R"({"jpg": "b.png", "de": "Katze"})");
  std::vector<std::string> bad;
  const auto entries =
      read_manifest(folder / "m.jsonl", [&](const std::string& why) { bad.push_back(why); }, {"jpg", "en"});
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_EQ(entries[0].captions, (std::vector<std::string>{"dog"}));
  EXPECT_EQ(entries[0].segments[1].image.name(), (folder / "a.png").string());
  ASSERT_EQ(bad.size(), 1u);
  EXPECT_NE(bad[0].find("m.jsonl:2: has no \"en\" (--text-column), it has \"de\", \"jpg\""), std::string::npos)
      << bad[0];
  EXPECT_NE(error_of([&] {
              read_manifest(folder / "m.jsonl", [](const std::string&) {}, {"none", ""});
            }).find("none of its 2 rows can be read; the first: "),
            std::string::npos);
}

// Named as it lies in the folder where one is: no folder in the name.
TEST(Manifest, InTheCurrentFolder) {
  Folder folder;
  write(folder / "img/a.png", ""), write(folder / "m.jsonl", R"({"image": "img/a.png", "text": "x"})"),
      write(folder / "m.csv", "image,text\nimg/a.png,x\n");
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(folder / "");
  for (const char* name : {"m.jsonl", "m.csv"}) EXPECT_EQ(error_of([&] { read_manifest(name); }), "") << name;
  std::filesystem::current_path(before);
}

TEST(Manifest, QuotesWithinAField) {
  Folder folder;
  write(folder / "a.png", "");
  write(folder / "m.csv",
        "image,text\na.png,5\" pipe\na.png,\"6\"\" pipe, long\"\na.png,a \"red\" heart\na.png,\"\"\n");
  std::vector<std::string> texts;
  for (const auto& entry : read_manifest(folder / "m.csv", [](const std::string&) {}))
    texts.push_back(entry.captions.front());
  EXPECT_EQ(texts, (std::vector<std::string>{"5\" pipe", "6\" pipe, long", "a \"red\" heart"}));
}

TEST(Manifest, OneBadRowDoesNotEndTheJob) {
  Folder folder;
  write(folder / "m.jsonl", "{\"text\": \"a\"}\n{broken\n{\"text\": \"b\"}");
  std::vector<std::string> bad;
  EXPECT_EQ(read_manifest(folder / "m.jsonl", [&](const std::string& why) { bad.push_back(why); }).size(), 2u);
  ASSERT_EQ(bad.size(), 1u);
  EXPECT_NE(bad[0].find("m.jsonl:2: not valid JSON"), std::string::npos);
}

struct Prepare : ::testing::Test {
  static void SetUpTestSuite() {
    shared = new Folder;
    std::string text;
    for (int i = 0; i < 200; ++i) text += "a red heart and a green apple, number " + std::to_string(i) + "\n";
    write(*shared / "train.txt", text);
    tokenizer::SentencePieceTraining training;
    training.vocab_size = 300;
    tokenizer::train_sentencepiece({*shared / "train.txt"}, *shared / "tokenizer", training);
    codec::VqConfig config;
    config.image_size = 12, config.channels = {8, 8}, config.mixer_width = 8, config.mixer_blocks = 1,
    config.codebook_size = 16, config.code_width = 4;
    codec::VqCodec(config, 3).save(*shared / "codec");
  }
  static void TearDownTestSuite() { delete shared; }
  static inline Folder* shared = nullptr;
  Folder folder;
  ShardOptions options;
  void SetUp() override {
    options.tokenizer = *shared / "tokenizer", options.codec = *shared / "codec", options.output = folder / "shards",
    options.batch_size = 2;
    std::filesystem::create_directories(folder / "images");
    for (int i = 0; i < 5; ++i)
      io::save_image(folder / ("images/" + std::to_string(i) + ".png"), at::full({3, 12, 12}, 40 * i, at::kByte));
  }
};

TEST_F(Prepare, CaptionedPictures) {
  std::string manifest;
  for (int i = 0; i < 5; ++i)
    manifest += R"({"image": "images/)" + std::to_string(i) +
                R"(.png", "text": "red heart", "captions": ["red heart", "a green apple"]})"
                "\n";
  write(folder / "m.jsonl", manifest);
  options.manifests = {folder / "m.jsonl"};
  options.captions = "all";
  const auto summary = prepare_shards(options);
  EXPECT_EQ(summary.documents, 10);
  EXPECT_EQ(summary.images, 5);
  const ShardSet shards(options.output);
  EXPECT_EQ(shards.num_items(), 5);  // the captions of a picture are one
  EXPECT_EQ(shards.item(2).first, 4);
  const auto tokenizer = tokenizer::load_tokenizer(options.tokenizer);
  const auto codec = codec::load_codec(options.codec);
  EXPECT_EQ(shards.schema(), (Schema{{{"text", tokenizer->size(), 0}, {"image", 16, 4, 1, {2, 2}}}}));
  for (int64_t i = 0; i < 10; ++i) {
    const auto document = test::to_lists(shards.document(i));
    ASSERT_EQ(document.size(), 2u);
    const auto ids = tokenizer->encode(i % 2 ? "a green apple" : "red heart");
    EXPECT_EQ(document[0].second, (std::vector<int32_t>(ids.begin(), ids.end())));
    const auto pixels = codec->prepare(io::load_image(folder / ("images/" + std::to_string(i / 2) + ".png")));
    const auto codes = test::values(codec->encode(pixels.unsqueeze(0)).reshape(-1).contiguous());
    EXPECT_EQ(document[1].second, (std::vector<int32_t>(codes.begin(), codes.end())));
  }
}

TEST_F(Prepare, TwoModalitiesOfImagesInOneSet) {
  codec::VqConfig config;
  config.image_size = 12, config.patch = 2, config.channels = {8}, config.encoder_blocks = config.decoder_blocks = {0},
  config.mixer_width = 8, config.mixer_blocks = 1, config.codebook_size = 9, config.code_width = 4;
  codec::VqCodec(config, 5).save(folder / "fine");
  write(
      folder / "m.jsonl",
      R"({"image": "images/1.png", "text": "red heart"})"
      "\n"
      R"({"segments": [{"text": "a green apple"}, {"image": "images/1.png", "modality": "fine"}]})"
      "\n"
      R"({"segments": [{"image": "images/2.png", "modality": "fine"}, {"image": "images/3.png"}, {"text": "number 7"}]})"
      "\n");
  options.manifests = {folder / "m.jsonl"};
  options.codecs = {{"fine", folder / "fine"}};
  const auto summary = prepare_shards(options);
  EXPECT_EQ(summary.documents, 3);
  EXPECT_EQ(summary.images, 4);  // the first by both codecs
  const ShardSet shards(options.output);
  const auto tokenizer = tokenizer::load_tokenizer(options.tokenizer);
  EXPECT_EQ(shards.schema(),
            (Schema{{{"text", tokenizer->size(), 0}, {"image", 16, 4, 1, {2, 2}}, {"fine", 9, 36, 1, {6, 6}}}}));
  EXPECT_EQ(shards.fingerprints(),
            (std::map<std::string, std::string>{{"tokenizer", tokenizer_fingerprint(*tokenizer)},
                                                {"codec.image", codec_fingerprint(options.codec)},
                                                {"codec.fine", codec_fingerprint(folder / "fine")}}));
  const auto codes = [&](const std::filesystem::path& of, int picture) {
    const auto codec = codec::load_codec(of);
    const auto ids = test::values(
        codec
            ->encode(
                codec->prepare(io::load_image(folder / ("images/" + std::to_string(picture) + ".png"))).unsqueeze(0))
            .reshape(-1)
            .contiguous());
    return std::vector<int32_t>(ids.begin(), ids.end());
  };
  const auto text = [&](const char* words) {
    const auto ids = tokenizer->encode(words);
    return std::vector<int32_t>(ids.begin(), ids.end());
  };
  EXPECT_EQ(test::to_lists(shards.document(0)), (test::Lists{{0, text("red heart")}, {1, codes(options.codec, 1)}}));
  EXPECT_EQ(test::to_lists(shards.document(1)),
            (test::Lists{{0, text("a green apple")}, {2, codes(folder / "fine", 1)}}));
  EXPECT_EQ(test::to_lists(shards.document(2)),
            (test::Lists{{2, codes(folder / "fine", 2)}, {1, codes(options.codec, 3)}, {0, text("number 7")}}));

  options.overwrite = true;
  options.codecs.clear();
  EXPECT_EQ(
      error_of([&] { prepare_shards(options); }),
      "the manifest holds images of the modality \"fine\": name the folder of their codec with --codec-of fine=DIR");
  options.codecs = {{"image", folder / "fine"}};
  EXPECT_NE(
      error_of([&] { prepare_shards(options); }).find("--codec-of image is given by --codec and --modality already"),
      std::string::npos);
  options.codecs = {{"a,b", folder / "fine"}};
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("--codec-of must name"), std::string::npos);
  write(folder / "m.jsonl", R"({"segments": [{"image": "images/2.png", "modality": 3}]})");
  options.codecs = {{"fine", folder / "fine"}}, options.strict = true;
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("\"modality\" must be a string, got number"),
            std::string::npos);
  write(folder / "m.jsonl", R"({"segments": [{"image": "images/2.png", "modality": ""}]})");
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("a segment's \"modality\" is empty"), std::string::npos);
}

TEST_F(Prepare, AnImageThatDoesNotDecodeIsSkippedAndCounted) {
  write(folder / "images/bad.png", "\x89PNG\r\n\x1a\nnonsense");
  write(folder / "m.jsonl", R"({"image": "images/bad.png", "text": "red"})"
                            "\n"
                            R"({"image": "images/1.png", "text": "green"})"
                            "\n"
                            R"({"text": "apple"})");
  options.manifests = {folder / "m.jsonl"};
  const auto summary = prepare_shards(options);
  EXPECT_EQ(summary.documents, 2);
  EXPECT_EQ(summary.skipped_images, 1);
  EXPECT_EQ(summary.skipped_documents, 1);
  options.overwrite = true;
  options.strict = true;
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("bad.png"), std::string::npos);
  options.strict = false;
  write(folder / "m.jsonl", R"({"image": "images/bad.png", "text": "red"})");
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("1 of 1 documents would be skipped"), std::string::npos);
  write(folder / "m.jsonl", R"({"image": "images/none.png", "text": "red"})"
                            "\n"
                            R"({"text": "apple"})"
                            "\n"
                            R"({"image": "images/gone.png", "text": "red"})");
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("2 of 3 documents would be skipped"), std::string::npos);
  EXPECT_EQ(ShardSet(options.output).num_documents(), 2) << "a failed --overwrite leaves what was there";
  EXPECT_EQ(ShardSet(options.output).counts(),
            (std::map<std::string, int64_t>{{"bad_rows", 0}, {"skipped_documents", 1}, {"skipped_images", 1}}));
}

TEST_F(Prepare, PlainText) {
  write(folder / "t.txt", "Red Heart\n\n  a green apple  \n");
  options.texts = {folder / "t.txt"};
  options.codec.clear();
  options.lowercase = true;
  EXPECT_EQ(prepare_shards(options).documents, 2);
  const ShardSet shards(options.output);
  EXPECT_EQ(shards.schema().modalities.size(), 1u);
  const auto ids = tokenizer::load_tokenizer(options.tokenizer)->encode("red heart");
  EXPECT_EQ(test::to_lists(shards.document(0)), (test::Lists{{0, {ids.begin(), ids.end()}}}));
  write(folder / "latin.txt", "one\ntwo\n\xe4 three\n");
  options.texts = {folder / "latin.txt"};
  options.overwrite = true;
  const auto some = prepare_shards(options);
  EXPECT_EQ(some.documents, 2);
  EXPECT_EQ(some.bad_rows, 1);
  options.strict = true;
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("latin.txt:3: its text is not UTF-8"), std::string::npos);
  options.texts = {folder / "none.txt"};
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("text file not found"), std::string::npos);
  write(folder / "rows.jsonl", "{}");
  options.texts = {folder / "rows.jsonl"};
  EXPECT_NE(error_of([&] {
              prepare_shards(options);
            }).find("rows.jsonl is a data set, whose rows are not lines of text: name it by --manifest"),
            std::string::npos);
  options.texts.clear();
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("nothing to prepare"), std::string::npos);
  write(folder / "m.jsonl", R"({"image": "images/1.png", "text": "green"})");
  options.manifests = {folder / "m.jsonl"};
  EXPECT_NE(error_of([&] { prepare_shards(options); }).find("--codec"), std::string::npos);
  for (const char* name : {"", "text", "a,b", "a\"b"}) {
    options.modality = name;
    EXPECT_NE(error_of([&] { prepare_shards(options); }).find("--modality must name"), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace moegraft::data
