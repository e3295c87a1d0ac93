// Damaged and unsupported tokenizer.json files, the files beside it, and long texts.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "tokenizer/regex.h"

namespace moegraft::tokenizer {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int64_t>;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/tokenizer";

json golden(const std::string& name) {
  std::ifstream in(kGolden / (name + ".tokenizer.json"));
  return json::parse(in);
}

class Folder : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "moegraft-tokenizer-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }

  void write(const std::string& name, const std::string& text) { std::ofstream(dir_ / name, std::ios::binary) << text; }
  std::string load_error() {
    try {
      load_tokenizer(dir_);
    } catch (const UserError& e) { return e.what(); }
    return "no error";
  }
  // Loads the golden file changed by `edit`.
  std::string error_after(const std::string& name, const std::function<void(json&)>& edit) {
    json data = golden(name);
    edit(data);
    write("tokenizer.json", data.dump());
    return load_error();
  }
  fs::path dir_;
};

TEST_F(Folder, UnsupportedPartsAreNamed) {
  const std::pair<const char*, const char*> cases[] = {{"normalizer", "BertNormalizer"},
                                                       {"pre_tokenizer", "UnicodeScripts"},
                                                       {"decoder", "WordPiece"},
                                                       {"post_processor", "NewKind"}};
  for (const auto& [part, type] : cases) {
    const std::string error = error_after("qwen2", [&](json& data) { data[part] = {{"type", type}}; });
    EXPECT_NE(error.find(std::string(part) + " '" + type + "' is not supported; known: "), std::string::npos) << error;
    EXPECT_NE(error.find("tokenizer.json"), std::string::npos) << error;
  }
  const std::string nested =
      error_after("qwen2", [](json& data) { data["pre_tokenizer"]["pretokenizers"][1] = {{"type", "Odd"}}; });
  EXPECT_NE(nested.find("tokenizer.json.pre_tokenizer.pretokenizers[1]: pre_tokenizer 'Odd'"), std::string::npos)
      << nested;
  EXPECT_NE(error_after("qwen2", [](json& data) { data["model"]["type"] = "WordPiece"; })
                .find("model 'WordPiece' is not supported"),
            std::string::npos);
}

TEST_F(Folder, DamagedFilesAreNamed) {
  struct Case {
    std::function<void(json&)> edit;
    const char* message;
  };
  const Case cases[] = {
      {[](json& d) { d.erase("model"); }, "the key 'model' is missing"},
      {[](json& d) { d["model"].erase("vocab"); }, "model: the key 'vocab' is missing"},
      {[](json& d) { d["model"]["vocab"] = json::array(); }, "model.vocab: expected an object"},
      {[](json& d) { d["model"]["vocab"]["a"] = -3; }, "model.vocab['a']: expected an id"},
      {[](json& d) { d["model"]["vocab"]["a"] = "x"; }, "model.vocab['a']: expected an id"},
      {[](json& d) { d["model"]["vocab"]["a"] = 2000000000; }, "model.vocab: expected ids below"},
      {[](json& d) { d["model"]["merges"] = 3; }, "model.merges: expected an array"},
      {[](json& d) { d["model"]["merges"][2] = "nospace"; }, "merges[2]: expected two tokens with a space"},
      {[](json& d) { d["model"]["merges"][2] = {"one"}; }, "merges[2]: expected a pair"},
      {[](json& d) { d["model"]["merges"][2] = {"zzzz", "q"}; },
       "merges[2]: the token 'zzzz' is not in the vocabulary"},
      {[](json& d) { d["model"]["dropout"] = 0.1; }, "model.dropout: expected null or 0"},
      {[](json& d) { d["model"]["unk_token"] = "<nope>"; }, "model.unk_token: expected a token of the vocabulary"},
      {[](json& d) { d["added_tokens"][0]["id"] = "zero"; }, "added_tokens[0].id: expected an integer"},
      {[](json& d) { d["added_tokens"][0].erase("content"); }, "added_tokens[0]: the key 'content' is missing"},
      {[](json& d) { d["added_tokens"].push_back({{"id", 5}, {"content", "<new>"}}); }, "one token for each id; 5 is"},
      {[](json& d) { d["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"Regex", "a(b"}}; },
       "pretokenizers[0].pattern: the regular expression does not compile"},
      {[](json& d) { d["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"Regex", "[a-z&&[^b]]"}}; },
       "intersection of character classes"},
      {[](json& d) { d["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Sideways"; },
       "behavior: expected Removed, Isolated"},
      {[](json& d) { d["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}}; },
       "normalizer: the key 'content' is missing"},
      {[](json& d) {
         d["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", json::array({{{"SpecialToken", {{"id", "<x>"}}}}})},
                                {"special_tokens", json::object()}};
       },
       "the special token <x>"},
      {[](json& d) { d["post_processor"] = {{"type", "BertProcessing"}, {"sep", {"x", 99999}}, {"cls", {"x", 1}}}; },
       "post_processor ids below"},
  };
  for (const auto& c : cases) {
    const std::string error = error_after("qwen2", c.edit);
    EXPECT_NE(error.find(c.message), std::string::npos) << "expected: " << c.message << "\ngot: " << error;
    EXPECT_EQ(error.find('\n'), std::string::npos);
  }
  EXPECT_EQ(error_after("qwen2", [](json&) {}), "no error");
  const std::string whole = golden("qwen2").dump();
  for (const std::string& bad : {std::string{}, whole.substr(0, whole.size() / 2),
                                 std::string("version https://git-lfs"), std::string("[1]"), std::string("null")}) {
    write("tokenizer.json", bad);
    EXPECT_NE(load_error().find("tokenizer.json"), std::string::npos) << load_error();
    EXPECT_NE(load_error(), "no error");
  }
}

TEST_F(Folder, FilesBesideNameTheEnds) {
  write("tokenizer.json", golden("qwen2").dump());
  EXPECT_EQ(load_tokenizer(dir_)->bos_id(), -1);
  write("config.json", R"({"bos_token_id": null, "eos_token_id": [2, 3]})");
  EXPECT_EQ(load_tokenizer(dir_)->bos_id(), -1);
  EXPECT_EQ(load_tokenizer(dir_)->eos_id(), 2);
  write("tokenizer_config.json", R"({"bos_token": {"content": "<s>", "special": true}, "eos_token": "<|end|>"})");
  const auto tokenizer = load_tokenizer(dir_);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 3);
  EXPECT_EQ(tokenizer->id_of("<|end|>"), 3);
  EXPECT_EQ(tokenizer->piece_of(3), "<|end|>");
  EXPECT_EQ(tokenizer->decode({1, 3}, true), "");
  EXPECT_EQ(tokenizer->decode({1, 3}, false), "<s><|end|>");
  EXPECT_THROW(tokenizer->decode({tokenizer->size()}), UserError);
  EXPECT_THROW(tokenizer->piece_of(-1), UserError);
  write("tokenizer_config.json", "[]");
  fs::copy_file(kGolden / "sp_bpe.model", dir_ / "tokenizer.model");
  fs::remove(dir_ / "tokenizer.json");
  EXPECT_NE(load_error().find("tokenizer_config.json: expected a JSON object"), std::string::npos) << load_error();
  write("tokenizer_config.json", R"({"add_bos_token": false, "add_eos_token": true})");
  auto ids = load_tokenizer(dir_)->encode("the heart");
  ids.push_back(2);
  EXPECT_EQ(load_tokenizer(dir_)->encode("the heart", true), ids);
  // A Unigram tokenizer.json gives way to the sentencepiece model beside it.
  write("tokenizer.json", R"({"model": {"type": "Unigram", "vocab": []}})");
  EXPECT_EQ(load_tokenizer(dir_)->encode("the heart", true), ids);
}

TEST_F(Folder, IllFormedUtf8BecomesReplacementCharacters) {
  const auto tokenizer = load_tokenizer(kGolden / "qwen2.tokenizer.json");
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("a\xff\xe2\x82z\xed\xa0\x80")), "a\uFFFD\uFFFDz\uFFFD\uFFFD\uFFFD");
}

// Quadratic merging would take minutes here.
TEST(LongText, IsLinearEnough) {
  std::string words, run(400000, 'a'), spaces(400000, ' ');
  for (int i = 0; i < 60000; ++i) words += "heart ";
  const auto start = std::chrono::steady_clock::now();
  for (const char* name : {"llama2", "qwen2", "o200k", "deepseek3"}) {
    const auto tokenizer = load_tokenizer(kGolden / (std::string(name) + ".tokenizer.json"));
    for (const auto& text : {words, run, spaces, spaces + "x"})
      EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text) << name;
  }
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 30);
}

TEST(RegexTranslation, KeepsOnigurumasMeaning) {
  const auto matches = [](const std::string& pattern, const std::string& text) {
    std::string out;
    Regex(pattern, "test").find_all(text, [&](size_t begin, size_t end) {
      out += "<" + text.substr(begin, end - begin) + ">";
    });
    return out;
  };
  EXPECT_EQ(matches(R"(\p{N}{1,2}+)", "12345 6"), "<12345><6>");  // a repeated range, not a possessive one
  EXPECT_EQ(matches("^b$", "a\nb\nc"), "<b>");                    // always multi-line
  EXPECT_EQ(matches("(?m:a.b)", "a\nb"), "<a\nb>");               // Ruby's m: dot matches newline
  EXPECT_EQ(matches("a.b", "a\nb"), "");
  EXPECT_EQ(matches(R"(\h+)", "xyzbeef 1"), "<beef><1>");  // hexadecimal digits
  EXPECT_EQ(matches(R"(\s)", "\u180e"), "");
  EXPECT_EQ(matches(R"(\s)", "\u0085"), "<\u0085>");
  EXPECT_EQ(matches(R"(\w+)", "a\u0301b\u00be \u00b7"), "<a\u0301b\u00be>");
  EXPECT_EQ(matches(R"(\p{Han}+)", "々漢。字"), "<々漢><字>");  // Script, not Script_Extensions
  EXPECT_EQ(matches(R"(\u3042|[\u3044-\u3046])", "あいえ"), "<あ><い>");
  EXPECT_EQ(matches("x*", "axxb"), "<><xx><>");  // empty matches do not touch the one before
  EXPECT_EQ(matches("[]a]+", "]a"), "<]a>");
  for (const char* bad : {"a(", "[a[b]]", "[a&&b]", "\\p{Nonsense}", "\\", "[[:nonsense:]]", "[\\W]", "\\u12"})
    EXPECT_THROW(Regex(bad, "test"), UserError) << bad;
}

}  // namespace
}  // namespace moegraft::tokenizer
