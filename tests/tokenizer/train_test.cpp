#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "moegraft/base/check.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::tokenizer {
namespace {

namespace fs = std::filesystem;

class Train : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "moegraft-tokenizer-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
    std::ofstream text(dir_ / "text.txt");
    const char* colours[] = {"red", "green", "blue", "yellow", "purple"};
    const char* things[] = {"heart", "circle", "book", "house", "flower", "fish"};
    for (const auto* colour : colours) {
      for (const auto* thing : things)
        text << "the " << colour << ' ' << thing << " and another " << thing << " in 2024\n";
    }
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string bytes(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

  fs::path dir_;
};

const char* const kTexts[] = {
    "the red heart", "", " ", "  two  spaces  ", "a\tb\n\nc", "日本語 ❤️👩‍👧🏽", "2024 1234567",
    "unseen Ünïcödé"};

TEST_F(Train, RoundTripsAndIsDeterministic) {
  for (const std::string type : {"bpe", "unigram"}) {
    SentencePieceTraining options{.model_type = type, .vocab_size = 288};
    train_sentencepiece({dir_ / "text.txt"}, dir_ / (type + "1"), options);
    train_sentencepiece({dir_ / "text.txt"}, dir_ / (type + "2"), options);
    for (const char* file : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}) {
      EXPECT_EQ(bytes(dir_ / (type + "1") / file), bytes(dir_ / (type + "2") / file)) << type << ' ' << file;
    }
    const auto tokenizer = load_tokenizer(dir_ / (type + "1"));
    const auto plain = load_tokenizer(dir_ / (type + "1") / "tokenizer.model");
    EXPECT_EQ(tokenizer->size(), 288);
    EXPECT_EQ(tokenizer->bos_id(), 1);
    EXPECT_EQ(tokenizer->eos_id(), 2);
    EXPECT_EQ(tokenizer->piece_of(3), "<0x00>");
    EXPECT_EQ(tokenizer->id_of("<unk>"), 0);
    EXPECT_EQ(tokenizer->id_of("no such piece"), -1);
    for (const std::string text : kTexts) {
      const auto ids = tokenizer->encode(text);
      EXPECT_EQ(ids, plain->encode(text)) << type << " tokenizer.json and tokenizer.model disagree on: " << text;
      EXPECT_EQ(tokenizer->decode(ids), text) << type;
      EXPECT_EQ(plain->decode(ids), text) << type;
      auto special = ids;
      special.insert(special.begin(), 1);
      EXPECT_EQ(tokenizer->encode(text, true), special);
      EXPECT_EQ(plain->encode(text, true), special);
      EXPECT_EQ(plain->decode(special, true), text);
      EXPECT_EQ(plain->decode(special, false), "<s>" + (text.empty() ? "" : text)) << type;
    }
    EXPECT_LT(tokenizer->encode("the red heart").size(), 13u);  // fewer pieces than characters
  }
}

TEST_F(Train, DummyPrefixAndDigitsAreOptions) {
  SentencePieceTraining options{.vocab_size = 320, .add_dummy_prefix = false, .split_digits = false};
  train_sentencepiece({dir_ / "text.txt"}, dir_ / "t", options);
  const auto tokenizer = load_tokenizer(dir_ / "t");
  for (const std::string text : kTexts) EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  EXPECT_EQ(tokenizer->piece_of(tokenizer->encode("the")[0])[0], 't');
  const auto year = tokenizer->encode("in 2024");
  EXPECT_TRUE(tokenizer->piece_of(year.back()).ends_with("2024")) << tokenizer->piece_of(year.back());
}

TEST_F(Train, SampleDependsOnTheSeedOnly) {
  SentencePieceTraining options{.vocab_size = 300, .max_sentences = 20, .seed = 3};
  train_sentencepiece({dir_ / "text.txt"}, dir_ / "a", options);
  train_sentencepiece({dir_ / "text.txt"}, dir_ / "b", options);
  options.seed = 4;
  train_sentencepiece({dir_ / "text.txt"}, dir_ / "c", options);
  EXPECT_EQ(bytes(dir_ / "a/tokenizer.model"), bytes(dir_ / "b/tokenizer.model"));
  EXPECT_NE(bytes(dir_ / "a/tokenizer.model"), bytes(dir_ / "c/tokenizer.model"));
}

template <class Error, class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) { return e.what(); }
  return "no error";
}

TEST_F(Train, BadUse) {
  const auto train = [&](SentencePieceTraining options, const fs::path& text, const fs::path& out) {
    train_sentencepiece({text}, out, options);
  };
  const fs::path text = dir_ / "text.txt", out = dir_ / "out";
  const auto has = [](const std::string& message, const std::string& part) {
    return message.find(part) != std::string::npos;
  };
  EXPECT_PRED2(has, error_of<UsageError>([&] { train({.model_type = "word"}, text, out); }),
               "bpe or unigram, got 'word'");
  EXPECT_PRED2(has, error_of<UsageError>([&] { train({.vocab_size = 100}, text, out); }), "[260, 1000000]");
  EXPECT_PRED2(has, error_of<UsageError>([&] { train({.character_coverage = 1.5}, text, out); }), "character_coverage");
  EXPECT_PRED2(has, error_of<UserError>([&] { train({}, dir_ / "missing.txt", out); }), "missing.txt");
  EXPECT_PRED2(has, error_of<UserError>([&] { train({.vocab_size = 50000}, text, out); }), "ocab");
  write(dir_ / "empty.txt", "\n\n");
  EXPECT_PRED2(has, error_of<UserError>([&] { train({}, dir_ / "empty.txt", out); }), "no line of text");
  write(dir_ / "file", "x");
  EXPECT_PRED2(has, error_of<UserError>([&] { train({.vocab_size = 300}, text, dir_ / "file" / "sub"); }),
               "cannot create the folder");
}

TEST_F(Train, CorruptModels) {
  EXPECT_THROW(load_tokenizer(dir_ / "nothing"), UserError);
  EXPECT_THROW(load_tokenizer(dir_), UserError);  // a folder without a tokenizer
  train_sentencepiece({dir_ / "text.txt"}, dir_ / "t", {.vocab_size = 300});
  const std::string model = bytes(dir_ / "t/tokenizer.model");
  for (const std::string& bad : {std::string{}, model.substr(0, model.size() / 2 + 1),
                                 std::string("version https://git-lfs.github.com/spec/v1\n")}) {
    write(dir_ / "tokenizer.model", bad);
    EXPECT_NE(error_of<UserError>([&] { load_tokenizer(dir_); }).find("not a sentencepiece model"), std::string::npos);
  }
  const auto tokenizer = load_tokenizer(dir_ / "t/tokenizer.model");
  EXPECT_THROW(tokenizer->decode({300}), UserError);
  EXPECT_THROW(tokenizer->decode({-1}), UserError);
  EXPECT_THROW(tokenizer->piece_of(300), UserError);
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("\xff"
                                                "a\xe2\x82")),
            "\xEF\xBF\xBD"
            "a\xEF\xBF\xBD");
}

}  // namespace
}  // namespace moegraft::tokenizer
