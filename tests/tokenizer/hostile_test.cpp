// tokenizer.json files made to take all stack, memory or time: each is one line of error within seconds.
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace moegraft::tokenizer {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/tokenizer";

std::string repeat(const std::string& text, size_t n) {
  std::string out;
  for (; n > 0; --n) out += text;
  return out;
}

// A sequence inside a sequence, n times, as text: the library's own writer would need the stack that is tested here.
std::string nested(const char* list, const std::string& inner, size_t n) {
  return repeat(std::string(R"({"type":"Sequence",")") + list + "\":[", n) + inner + repeat("]}", n);
}

std::string steps(const char* list, const std::string& step, size_t n) {
  return std::string(R"({"type":"Sequence",")") + list + "\":[" + step + repeat("," + step, n - 1) + "]}";
}

std::string split(const std::string& regex) {
  return json{{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}}.dump();
}

const std::string kTimesTen = R"({"type":"Replace","pattern":{"String":"a"},"content":"aaaaaaaaaa"})";

struct Case {
  const char* name;
  const char* part;  // of tokenizer.json
  std::string value;
  std::string text;
  const char* message;
};

TEST(Hostile, TokenizersEndInOneLineWithinSeconds) {
  const std::string a60(60, 'a'), grows = "the tokenizer makes more than",
                                  slow = "takes too long or too much memory on a text of";
  const Case cases[] = {
      {"nested normalizers", "normalizer", nested("normalizers", R"({"type":"NFC"})", 20000), "a", "brackets nest"},
      {"nested pre-tokenizers", "pre_tokenizer", nested("pretokenizers", R"({"type":"Whitespace"})", 20000), "a",
       "brackets nest"},
      {"nested decoders", "decoder", nested("decoders", R"({"type":"Fuse"})", 20000), "a", "brackets nest"},
      {"nested processors", "post_processor", nested("processors", R"({"type":"ByteLevel"})", 20000), "a",
       "brackets nest"},
      {"nested lists for a value", "normalizer", repeat("[", 100000) + repeat("]", 100000), "a", "brackets nest"},
      {"a list for a type", "normalizer", R"({"type":)" + repeat("[", 50) + repeat("]", 50) + "}", "a",
       "normalizer.type: expected a string, got [[["},
      {"very many steps", "normalizer", steps("normalizers", R"({"type":"NFC"})", 100000), "a",
       "normalizer: expected at most 10000 values"},
      {"a number out of range", "normalizer", R"({"type":"Strip","strip_left":1e999})", "a",
       "number overflow parsing '1e999'"},
      {"replacements multiply", "normalizer", steps("normalizers", kTimesTen, 9), "a", grows.c_str()},
      {"nested replacements multiply", "normalizer", steps("normalizers", steps("normalizers", kTimesTen, 3), 3), "a",
       grows.c_str()},
      {"a long prefix", "normalizer",
       steps("normalizers", R"({"type":"Prepend","prepend":")" + std::string(1 << 20, 'x') + "\"}", 50), "a",
       grows.c_str()},
      {"bytes become two again and again", "pre_tokenizer",
       steps("pretokenizers", R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false})", 50), "é",
       grows.c_str()},
      {"decoders multiply", "decoder", steps("decoders", kTimesTen, 9), "a", grows.c_str()},
      {"an empty suffix", "decoder", R"({"type":"BPEDecoder","suffix":""})", "a",
       "decoder: expected a suffix that is not empty"},
      {"an exponential regex", "pre_tokenizer", split("(?:a?){60}a{60}"), a60, slow.c_str()},
      {"nested repeats", "pre_tokenizer", split("(a+)+$"), a60 + "!", slow.c_str()},
      {"five repeats", "pre_tokenizer", split("a*a*a*a*a*(?=[bc])"), std::string(1000, 'a'), slow.c_str()},
      {"a quadratic regex", "pre_tokenizer", split("a+[bc]|a"), std::string(400000, 'a'), slow.c_str()},
      {"many words that each take long", "pre_tokenizer",
       steps("pretokenizers", R"({"type":"WhitespaceSplit"},)" + split("(a+)+$"), 1),
       repeat(std::string(17, 'a') + "! ", 3000), slow.c_str()},
      {"recursion", "pre_tokenizer", split("(a|(?1)(?1))*[bc]"), a60, slow.c_str()},
      {"a replacement's regex", "normalizer", R"({"type":"Replace","pattern":{"Regex":"(a+)+$"},"content":""})",
       a60 + "!", slow.c_str()},
      {"a verb that lifts limits", "pre_tokenizer", split("(*LIMIT_MATCH=4000000000)(a+)+$"), a60 + "!",
       "pre_tokenizer.pattern: a verb (*...) in the regular expression is not supported"},
      {"a verb within", "pre_tokenizer", split("a(*COMMIT)b"), "a", "a verb (*...) in the regular expression"},
      {"bytes of characters", "pre_tokenizer", split("\\C\\K"), "é",
       "does not compile (using \\C is disabled by the application"},
      {"a huge regex", "pre_tokenizer", split(std::string(20000, 'a')), "a",
       "a regular expression of 20000 bytes, expected at most 16384"},
      {"a huge repeat", "pre_tokenizer", split(repeat("(?:", 20) + "a" + repeat("){99}", 20)), "a", "does not compile"},
  };
  std::string name = (fs::temp_directory_path() / "moegraft-hostile-XXXXXX").string();
  ASSERT_NE(mkdtemp(name.data()), nullptr);
  const fs::path dir = name;
  std::ifstream in(kGolden / "llama2.tokenizer.json");
  const json golden = json::parse(in);
  for (const Case& c : cases) {
    json data = golden;
    data[c.part] = "HERE";
    std::string text = data.dump();
    text.replace(text.find("\"HERE\""), 6, c.value);
    std::ofstream(dir / "tokenizer.json", std::ios::binary) << text;
    const auto start = std::chrono::steady_clock::now();
    std::string error = "no error";
    try {
      const auto tokenizer = load_tokenizer(dir);
      tokenizer->decode(tokenizer->encode(c.text));
    } catch (const UserError& e) { error = e.what(); }
    EXPECT_NE(error.find(c.message), std::string::npos) << c.name << ": " << error.substr(0, 300);
    EXPECT_EQ(error.find('\n'), std::string::npos) << c.name;
    EXPECT_LT(error.size(), 600u) << c.name;
    EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 8) << c.name;
  }
  fs::remove_all(dir);
}

// The same values from positions far apart as when each match were looked for at once.
TEST(Hostile, MatchesAreFoundBeyondTheStartsOfOneCall) {
  for (const size_t gap : {511u, 512u, 513u, 1024u, 5000u}) {
    const std::string text = repeat("é", gap) + "x" + repeat("é", gap) + "x";
    std::vector<size_t> found;
    Regex("x|$", "test").find_all(text, [&](size_t begin, size_t) { found.push_back(begin); });
    EXPECT_EQ(found, (std::vector<size_t>{2 * gap, 4 * gap + 1}))
        << gap;  // the empty match at the end touches the last one
    found.clear();
    Regex("x(?=é)|é(?=x)", "test").find_all(text, [&](size_t begin, size_t) { found.push_back(begin); });
    EXPECT_EQ(found, (std::vector<size_t>{2 * gap - 2, 2 * gap, 4 * gap - 1})) << gap;
  }
}

TEST(Hostile, ACutCharacterIsReadToTheEndOfTheTextOnly) {
  for (const std::string& whole : {std::string("é"), std::string("\u20ac"), std::string("\U0001F600")}) {
    for (size_t n = 1; n < whole.size(); ++n) {
      const std::string exact(whole, 0, n);  // its own allocation: a sanitizer sees what lies behind
      size_t offset = 0;
      next_code_point(exact, offset);
      EXPECT_EQ(offset, n);
    }
  }
}

}  // namespace
}  // namespace moegraft::tokenizer
