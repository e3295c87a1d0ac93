#include "gguf_tokenizer.h"

#include <algorithm>
#include <set>
#include <tuple>
#include <unordered_map>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::convert {
namespace {

using Json = nlohmann::ordered_json;

enum TokenType : int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

constexpr const char* kSpace = "\xE2\x96\x81";  // sentencepiece's sign for a space

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}
Json sequence(const char* list, Json items) { return {{"type", "Sequence"}, {list, std::move(items)}}; }
Json split(const char* regex) {
  return {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}};
}

// How text is cut before merges, by the name in tokenizer.ggml.pre. Each as the tokenizer.json of the models it is
// named after has it.
struct PreTokenizer {
  const char* name;
  Json (*pre_tokenizer)();
  bool nfc;            // normalised first
  bool ignore_merges;  // a word that is a token is taken whole
};
Json words() { return byte_level(true); }
Json digits_and_words() {
  return sequence("pretokenizers", Json::array({{{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)}));
}
Json llama3() {
  return sequence(
      "pretokenizers",
      Json::array(
          {split(
               R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"),
           byte_level(false)}));
}
Json qwen2() {
  return sequence(
      "pretokenizers",
      Json::array(
          {split(
               R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"),
           byte_level(false)}));
}
constexpr PreTokenizer kPreTokenizers[] = {
    {"gpt-2", words, false, false},
    {"smollm", digits_and_words, false, false},
    {"starcoder", digits_and_words, false, false},
    {"refact", digits_and_words, false, false},
    {"olmo", words, true, false},
    {"llama-bpe", llama3, false, true},
    {"qwen2", qwen2, true, false},
};

const PreTokenizer& find_pre_tokenizer(const GgufFile& file) {
  const std::string name = file.string("tokenizer.ggml.pre", "gpt-2");
  std::vector<std::string> known;
  for (const auto& p : kPreTokenizers) {
    if (name == p.name) return p;
    known.emplace_back(p.name);
  }
  fail(file.path().string(), ": tokenizer.ggml.pre \"", name, "\" is not known here; known: ", join(known, ", "), "");
}

struct Vocabulary {
  const std::vector<std::string>& tokens;
  std::vector<int64_t> types;
  std::unordered_map<std::string, int64_t> ids;

  explicit Vocabulary(const GgufFile& file) : tokens(file.strings("tokenizer.ggml.tokens")) {
    types = file.has("tokenizer.ggml.token_type") ? file.integers("tokenizer.ggml.token_type")
                                                  : std::vector<int64_t>(tokens.size(), kNormal);
    MOEGRAFT_CHECK(types.size() == tokens.size(), file.path().string(), ": tokenizer.ggml.token_type has ",
                   types.size(), " entries for ", tokens.size(), " tokens");
    for (size_t i = 0; i < tokens.size(); ++i)
      MOEGRAFT_CHECK(ids.emplace(tokens[i], int64_t(i)).second, file.path().string(), ": the token '", tokens[i],
                     "' is there twice");
  }
  Json as_json() const {
    Json vocab = Json::object();
    for (size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = i;
    return vocab;
  }
  Json added_tokens() const {
    Json added = Json::array();
    for (size_t i = 0; i < tokens.size(); ++i) {
      const bool special = types[i] == kControl || types[i] == kUnknown;
      if (special || types[i] == kUserDefined)
        added.push_back({{"id", i},
                         {"content", tokens[i]},
                         {"single_word", false},
                         {"lstrip", false},
                         {"rstrip", false},
                         {"normalized", false},
                         {"special", special}});
    }
    return added;
  }
};

Json bpe(const Vocabulary& v, Json merges) {
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false},
          {"vocab", v.as_json()},
          {"merges", std::move(merges)}};
}

// Byte-level BPE. Merges are "left right".
Json byte_level_tokenizer(const GgufFile& file, const Vocabulary& v, Json& out) {
  const PreTokenizer& pre = find_pre_tokenizer(file);
  Json merges = Json::array();
  for (const std::string& merge : file.strings("tokenizer.ggml.merges")) {
    const size_t space = merge.find(' ', 1);
    MOEGRAFT_CHECK(space != std::string::npos && space + 1 < merge.size(), file.path().string(), ": the merge '", merge,
                   "' must be two tokens with a space between");
    merges.push_back({merge.substr(0, space), merge.substr(space + 1)});
  }
  out["normalizer"] = pre.nfc ? Json{{"type", "NFC"}} : Json(nullptr);
  out["pre_tokenizer"] = pre.pre_tokenizer();
  out["decoder"] = byte_level(true);
  Json model = bpe(v, std::move(merges));
  model["ignore_merges"] = pre.ignore_merges;
  return model;
}

// Sentencepiece's BPE: every way to build a piece from two, best piece first.
Json sentencepiece_tokenizer(const GgufFile& file, const Vocabulary& v, Json& out) {
  const std::vector<double> scores = file.numbers("tokenizer.ggml.scores");
  MOEGRAFT_CHECK(scores.size() == v.tokens.size(), file.path().string(), ": tokenizer.ggml.scores has ", scores.size(),
                 " entries for ", v.tokens.size(), " tokens");
  std::vector<std::tuple<double, int64_t, int64_t, int64_t>> found;  // (-score of the result, result, left, right)
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    if (v.types[i] != kNormal) continue;
    const std::string& piece = v.tokens[i];
    for (size_t cut = 1; cut < piece.size(); ++cut) {
      if ((static_cast<unsigned char>(piece[cut]) & 0xC0) == 0x80) continue;  // inside a character
      const auto left = v.ids.find(piece.substr(0, cut)), right = v.ids.find(piece.substr(cut));
      if (left != v.ids.end() && right != v.ids.end())
        found.emplace_back(-scores[i], int64_t(i), left->second, right->second);
    }
  }
  std::sort(found.begin(), found.end());
  Json merges = Json::array();
  for (const auto& [score, result, left, right] : found)
    merges.push_back({v.tokens[size_t(left)], v.tokens[size_t(right)]});
  const bool prefix = file.boolean("tokenizer.ggml.add_space_prefix", true);
  Json normalizers = Json::array();
  if (prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", kSpace}});
  normalizers.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kSpace}});
  Json decoders = Json::array({{{"type", "Replace"}, {"pattern", {{"String", kSpace}}}, {"content", " "}},
                               {{"type", "ByteFallback"}},
                               {{"type", "Fuse"}}});
  if (prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  out["normalizer"] = sequence("normalizers", std::move(normalizers));
  out["pre_tokenizer"] = nullptr;
  out["decoder"] = sequence("decoders", std::move(decoders));
  Json model = bpe(v, std::move(merges));
  const auto unknown = std::find(v.types.begin(), v.types.end(), kUnknown);
  if (unknown != v.types.end()) model["unk_token"] = v.tokens[size_t(unknown - v.types.begin())];
  model["fuse_unk"] = true;
  model["byte_fallback"] = std::count(v.types.begin(), v.types.end(), kByte) == 256;
  return model;
}

}  // namespace

std::optional<GgufTokenizer> read_gguf_tokenizer(const GgufFile& file) {
  const std::string kind = file.string("tokenizer.ggml.model", "no_vocab");
  if (kind == "no_vocab") return {};
  MOEGRAFT_CHECK(kind == "gpt2" || kind == "llama", file.path().string(), ": tokenizer.ggml.model \"", kind,
                 "\" is not known here; known: gpt2 (byte-level BPE), llama (sentencepiece)");
  const Vocabulary v(file);
  GgufTokenizer t;
  Json& out = t.tokenizer;
  out = {{"version", "1.0"},          {"truncation", nullptr},
         {"padding", nullptr},        {"added_tokens", v.added_tokens()},
         {"normalizer", nullptr},     {"pre_tokenizer", nullptr},
         {"post_processor", nullptr}, {"decoder", nullptr}};
  Json model = kind == "llama" ? sentencepiece_tokenizer(file, v, out) : byte_level_tokenizer(file, v, out);

  t.config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
              {"clean_up_tokenization_spaces", false},
              {"model_max_length", file.integer(file.string("general.architecture") + ".context_length", 1000000000)}};
  const auto token = [&](const char* key) -> Json {
    const int64_t id = file.integer(key, -1);
    MOEGRAFT_CHECK(id < int64_t(v.tokens.size()), file.path().string(), ": ", key, " is ", id, ", outside the ",
                   v.tokens.size(), " tokens");
    return id < 0 ? Json(nullptr) : Json(v.tokens[size_t(id)]);
  };
  t.config["bos_token"] = token("tokenizer.ggml.bos_token_id");
  t.config["eos_token"] = token("tokenizer.ggml.eos_token_id");
  t.config["unk_token"] = token("tokenizer.ggml.unknown_token_id");
  t.config["pad_token"] = token("tokenizer.ggml.padding_token_id");
  if (file.has("tokenizer.chat_template")) t.config["chat_template"] = file.string("tokenizer.chat_template");
  if (const Json& bos = t.config["bos_token"];
      !bos.is_null() && file.boolean("tokenizer.ggml.add_bos_token", kind == "llama")) {
    const std::string name = bos.get<std::string>();
    const Json first = {{"SpecialToken", {{"id", name}, {"type_id", 0}}}},
               a = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, b = {{"Sequence", {{"id", "B"}, {"type_id", 1}}}};
    out["post_processor"] = {
        {"type", "TemplateProcessing"},
        {"single", Json::array({first, a})},
        {"pair", Json::array({first, a, b})},
        {"special_tokens", {{name, {{"id", name}, {"ids", {v.ids.at(name)}}, {"tokens", {name}}}}}}};
  }
  out["model"] = std::move(model);
  return t;
}

}  // namespace moegraft::convert
