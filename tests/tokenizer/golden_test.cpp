// Ids and decodings against the `tokenizers` and `sentencepiece` packages (tests/golden/make_tokenizer.py).
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::tokenizer {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int64_t>;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/tokenizer";

json read(const fs::path& path) {
  std::ifstream in(path);
  return json::parse(in);
}

const json& texts() {
  static const json t = read(kGolden / "texts.json");
  return t;
}

std::string fingerprint(const Ids& ids, const std::string& text) {
  uint64_t h = 0xCBF29CE484222325u;
  const auto add = [&](unsigned char byte) { h = (h ^ byte) * 0x100000001B3u; };
  for (const auto id : ids) {
    for (int shift = 0; shift < 32; shift += 8) add(static_cast<unsigned char>(id >> shift));
  }
  for (const char c : text) add(static_cast<unsigned char>(c));
  char hex[17];
  std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(h));
  return hex;
}

std::string show(const Ids& ids, const Tokenizer& tokenizer) {
  std::string out;
  for (const auto id : ids) out += std::to_string(id) + "(" + tokenizer.piece_of(id) + ") ";
  return out;
}

class Golden : public ::testing::TestWithParam<std::string> {};

TEST_P(Golden, EqualsThePackage) {
  const std::string name = GetParam();
  const bool sentencepiece = name.starts_with("sp_");
  const auto tokenizer = load_tokenizer(kGolden / (name + (sentencepiece ? ".model" : ".tokenizer.json")));
  const json want = read(kGolden / (name + ".expected.json"));
  EXPECT_EQ(tokenizer->size(), want["size"].get<int64_t>());

  const auto before = want["before"].get<Ids>(), after = want["after"].get<Ids>();
  for (size_t i = 0; i < want["nasty"].size(); ++i) {
    if (want["nasty"][i].is_null()) continue;  // a tie between segmentations
    const auto text = texts()["nasty"][i].get<std::string>();
    const auto ids = want["nasty"][i]["ids"].get<Ids>();
    const auto got = tokenizer->encode(text);
    EXPECT_EQ(got, ids) << name << " nasty[" << i << "]: " << json(text).dump() << "\n got  " << show(got, *tokenizer)
                        << "\n want " << show(ids, *tokenizer);
    EXPECT_EQ(tokenizer->decode(ids), want["nasty"][i]["text"].get<std::string>())
        << name << " decoding of nasty[" << i << "]: " << json(text).dump();
    Ids special = before;
    special.insert(special.end(), ids.begin(), ids.end());
    special.insert(special.end(), after.begin(), after.end());
    EXPECT_EQ(tokenizer->encode(text, true), special) << name;
    EXPECT_EQ(tokenizer->encode(text), got) << name << ": the cache changed the result";
  }
  int differing = 0;
  for (size_t i = 0; i < want["fuzz"].size(); ++i) {
    if (want["fuzz"][i].is_null()) continue;
    const auto text = texts()["fuzz"][i].get<std::string>();
    const auto got = tokenizer->encode(text);
    if (fingerprint(got, tokenizer->decode(got)) == want["fuzz"][i].get<std::string>()) continue;
    if (++differing <= 3)
      ADD_FAILURE() << name << " fuzz[" << i << "]: " << json(text).dump() << "\n got  " << show(got, *tokenizer);
  }
  EXPECT_EQ(differing, 0) << name << ": of " << want["fuzz"].size() << " fuzzed texts";
  for (const auto& entry : want["decode"]) {
    const auto ids = entry["ids"].get<Ids>();
    EXPECT_EQ(tokenizer->decode(ids, true), entry["skip"].get<std::string>()) << name << ' ' << show(ids, *tokenizer);
    if (entry.contains("keep")) {
      EXPECT_EQ(tokenizer->decode(ids, false), entry["keep"].get<std::string>())
          << name << ' ' << show(ids, *tokenizer);
    }
  }
}

std::vector<std::string> names() {
  std::vector<std::string> out;
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    const std::string file = entry.path().filename().string();
    if (const auto end = file.find(".expected.json"); end != std::string::npos) out.push_back(file.substr(0, end));
  }
  std::sort(out.begin(), out.end());
  return out;
}

INSTANTIATE_TEST_SUITE_P(Layouts, Golden, ::testing::ValuesIn(names()), [](const auto& info) { return info.param; });

TEST(GoldenFiles, AreAllThere) { EXPECT_GE(names().size(), 24u); }

TEST(Tokenizer, SeveralThreadsAtOnce) {
  const auto tokenizer = load_tokenizer(kGolden / "qwen2.tokenizer.json");
  const json want = read(kGolden / "qwen2.expected.json");
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (size_t i = 0; i < want["nasty"].size(); ++i)
        wrong += tokenizer->encode(texts()["nasty"][i].get<std::string>()) != want["nasty"][i]["ids"].get<Ids>();
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace moegraft::tokenizer
