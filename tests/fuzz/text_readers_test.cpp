// Readers that need no LibTorch, over mutated files. Built a second time with AddressSanitizer and UBSan
// (tests/CMakeLists.txt).
//   MOEGRAFT_FUZZ_SECONDS=3600 build/tests/test_fuzz_sanitized      (default: a few seconds a reader;
//   MOEGRAFT_FUZZ_SEED: another sequence)
#include "harness.h"
#include "moegraft/config/config.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::fuzz {
namespace {

struct Small {
  std::string name = "a", path;
  std::vector<double> numbers;
  int64_t count = 3;
  template <class V>
  void visit_fields(V& v) {
    v("name", name, config::any(), "A name.");
    v("path", path, config::any(), "A path.");
    v("numbers", numbers, config::any(), "Numbers.");
    v("count", count, config::range(1, 100), "A count.");
  }
};

TEST(Fuzz, Yaml) {
  run({"yaml",
       {"name: x\npath: ~/a\nnumbers: [1, 2.5, -3e4]\ncount: 7\n", "# comment\n{name: \"a b\", numbers: [], count: 1}",
        "name: |\n  text\n  more\nnumbers:\n  - 1\n  - 2\n"}},
      [](const Scratch&, const std::string& text) {
        config::dump(config::parse<Small>(config::Document::from_string(text)));
      });
}

TEST(Fuzz, TokenizerJson) {
  std::vector<std::string> seeds;
  for (const char* name : {"llama3", "llama2", "gpt2_prefix", "deepseek3", "byte_normalizer"})
    seeds.push_back(golden(std::string("tokenizer/") + name + ".tokenizer.json"));
  run({"tokenizer.json", seeds}, [](const Scratch& dir, const std::string& text) {
    const auto file = dir.write("tokenizer.json", text);
    const auto tokenizer = tokenizer::load_tokenizer(file);
    const auto ids = tokenizer->encode("The red heart's 2024  <s>x</s> \xF0\x9F\x98\x80 naïve\n\n", true);
    tokenizer->decode(ids);
  });
}

TEST(Fuzz, TokenizerConfig) {
  const std::string json = golden("tokenizer/llama3.tokenizer.json");
  run({"tokenizer_config.json",
       {R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "added_tokens_decoder": {"300": {"content": "<|x|>", "special": true, "lstrip": false}}})",
        R"({"added_tokens_decoder": {}})"}},
      [&](const Scratch& dir, const std::string& text) {
        dir.write("tokenizer_config.json", text);
        tokenizer::load_tokenizer(dir.write("tokenizer.json", json))->encode("a <|x|> b", true);
      });
}

}  // namespace
}  // namespace moegraft::fuzz
