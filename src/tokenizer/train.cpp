// Training through the sentencepiece library, and the tokenizer.json that makes transformers agree with it.
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <fstream>
#include <numeric>
#include <tuple>

#include "files.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/rng.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr size_t kMaxLineBytes = 1 << 16;  // longer lines cost the trainer quadratic memory
constexpr const char* kSpace = "\xE2\x96\x81";

class Lines : public sentencepiece::SentenceIterator {
 public:
  explicit Lines(const std::vector<std::string>& lines) : lines_(lines) {}
  bool done() const override { return next_ >= lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::vector<std::string>& lines_;
  size_t next_ = 0;
};

std::vector<std::string> read_lines(const std::vector<fs::path>& files, const SentencePieceTraining& options) {
  std::vector<std::string> lines;
  Rng rng(static_cast<uint64_t>(options.seed), "tokenizer.sentences");
  int64_t seen = 0, too_long = 0;
  for (const auto& file : files) {
    std::ifstream in(file, std::ios::binary);
    MOEGRAFT_CHECK(in && !fs::is_directory(file), file.string(), ": cannot read training text");
    for (std::string line; std::getline(in, line);) {
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.empty() || line.find('\0') != std::string::npos) continue;
      if (line.size() > kMaxLineBytes) {
        ++too_long;
        continue;
      }
      if (!is_valid_utf8(line)) line = valid_utf8(line);
      ++seen;
      if (options.max_sentences <= 0 || seen <= options.max_sentences) {
        lines.push_back(std::move(line));
      } else if (const auto slot = rng.below(static_cast<uint64_t>(seen)); slot < lines.size()) {  // reservoir sampling
        lines[slot] = std::move(line);
      }
    }
  }
  if (too_long)
    log::warning("tokenizer training: skipped ", too_long, " lines longer than ", kMaxLineBytes,
                 " bytes; break them into sentences");
  MOEGRAFT_CHECK(!lines.empty(), "tokenizer training: the text files hold no line of text");
  return lines;
}

// Every way to build a piece from two pieces, best merged piece first: what the BPE of tokenizer.json needs to repeat
// sentencepiece's merges.
Json bpe_merges(const sentencepiece::SentencePieceProcessor& model, const std::unordered_map<std::string, int>& ids) {
  std::vector<std::tuple<int, int, int>>
      merges;  // (rank of the result, left, right): BPE ids are in order of falling score
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    if (model.IsControl(id) || model.IsByte(id) || model.IsUnknown(id)) continue;
    const std::string& piece = model.IdToPiece(id);
    for (size_t cut = utf8_length(static_cast<unsigned char>(piece[0])); cut < piece.size();
         cut += utf8_length(static_cast<unsigned char>(piece[cut]))) {
      const auto left = ids.find(piece.substr(0, cut)), right = ids.find(piece.substr(cut));
      if (left != ids.end() && right != ids.end()) merges.emplace_back(id, left->second, right->second);
    }
  }
  std::sort(merges.begin(), merges.end());
  Json out = Json::array();
  for (const auto& [result, left, right] : merges) out.push_back({model.IdToPiece(left), model.IdToPiece(right)});
  return out;
}

Json tokenizer_json(const sentencepiece::SentencePieceProcessor& model, const SentencePieceTraining& options) {
  Json added = Json::array();
  for (int id = 0; id < 3; ++id) {
    added.push_back({{"id", id},
                     {"content", model.IdToPiece(id)},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  Json normalizers = Json::array();
  if (options.add_dummy_prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", kSpace}});
  normalizers.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kSpace}});
  Json decoders = Json::array({{{"type", "Replace"}, {"pattern", {{"String", kSpace}}}, {"content", " "}},
                               {{"type", "ByteFallback"}},
                               {{"type", "Fuse"}}});
  if (options.add_dummy_prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  const Json bos = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}};
  const auto sequence = [](const char* id, int type) { return Json{{"Sequence", {{"id", id}, {"type_id", type}}}}; };

  Json m;
  std::unordered_map<std::string, int> ids;
  if (options.model_type == "bpe") {
    Json vocab = Json::object();
    for (int id = 0; id < model.GetPieceSize(); ++id) {
      vocab[model.IdToPiece(id)] = id;
      ids[model.IdToPiece(id)] = id;
    }
    m = {{"type", "BPE"},
         {"dropout", nullptr},
         {"unk_token", "<unk>"},
         {"continuing_subword_prefix", nullptr},
         {"end_of_word_suffix", nullptr},
         {"fuse_unk", true},
         {"byte_fallback", options.byte_fallback},
         {"ignore_merges", false},
         {"vocab", vocab},
         {"merges", bpe_merges(model, ids)}};
  } else {
    Json vocab = Json::array();
    for (int id = 0; id < model.GetPieceSize(); ++id)
      vocab.push_back({model.IdToPiece(id), static_cast<double>(model.GetScore(id))});
    m = {{"type", "Unigram"}, {"unk_id", 0}, {"vocab", vocab}, {"byte_fallback", options.byte_fallback}};
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", {{"type", "Sequence"}, {"normalizers", normalizers}}},
          {"pre_tokenizer", nullptr},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", Json::array({bos, sequence("A", 0)})},
            {"pair", Json::array({bos, sequence("A", 0), sequence("B", 1)})},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}}},
          {"decoder", {{"type", "Sequence"}, {"decoders", decoders}}},
          {"model", m}};
}

void check_options(const SentencePieceTraining& options) {
  MOEGRAFT_CHECK_USAGE(options.model_type == "bpe" || options.model_type == "unigram",
                       "tokenizer model type must be bpe or unigram, got '", options.model_type, "'");
  const int64_t least = options.byte_fallback ? 260 : 4;
  MOEGRAFT_CHECK_USAGE(options.vocab_size >= least && options.vocab_size <= 1000000,
                       "tokenizer vocab_size must be in [", least, ", 1000000] (3 special pieces",
                       options.byte_fallback ? ", 256 bytes" : "", " and the learned ones), got ", options.vocab_size);
  MOEGRAFT_CHECK_USAGE(options.character_coverage >= 0.98 && options.character_coverage <= 1,
                       "character_coverage must be in [0.98, 1], got ", options.character_coverage);
}

}  // namespace

void train_sentencepiece(const std::vector<fs::path>& text_files, const fs::path& dir,
                         const SentencePieceTraining& options) {
  check_options(options);
  MOEGRAFT_CHECK_USAGE(!text_files.empty(), "tokenizer training needs at least one text file");
  const auto lines = read_lines(text_files, options);
  const auto yes = [](bool value) { return std::string(value ? "true" : "false"); };
  const std::unordered_map<std::string, std::string> arguments = {
      {"model_type", options.model_type},
      {"vocab_size", std::to_string(options.vocab_size)},
      {"character_coverage", std::to_string(options.character_coverage)},
      {"byte_fallback", yes(options.byte_fallback)},
      {"add_dummy_prefix", yes(options.add_dummy_prefix)},
      {"split_digits", yes(options.split_digits)},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"max_sentence_length", std::to_string(kMaxLineBytes + 1)},
      {"num_threads", "2"},  // fixed: the unigram trainer sums floats per thread
      {"unk_id", "0"},
      {"bos_id", "1"},
      {"eos_id", "2"},
      {"pad_id", "-1"},
      {"minloglevel", "2"},
  };
  sentencepiece::SetRandomGeneratorSeed(static_cast<unsigned>(options.seed));
  Lines iterator(lines);
  std::string proto;
  const auto trained = sentencepiece::SentencePieceTrainer::Train(arguments, &iterator, &proto);
  MOEGRAFT_CHECK(trained.ok(), "sentencepiece training failed: ", trained.message());

  sentencepiece::SentencePieceProcessor model;
  const auto loaded = model.LoadFromSerializedProto(proto);
  MOEGRAFT_CHECK(loaded.ok(), "sentencepiece made a model that does not load: ", loaded.message());
  std::error_code error;
  fs::create_directories(dir, error);
  MOEGRAFT_CHECK(!error, dir.string(), ": cannot create the folder: ", error.message());
  const Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"add_bos_token", true},
                       {"add_eos_token", false},
                       {"bos_token", "<s>"},
                       {"eos_token", "</s>"},
                       {"unk_token", "<unk>"},
                       {"clean_up_tokenization_spaces", false},
                       {"model_max_length", 1000000000}};
  write_files(dir, {{"tokenizer.model", proto},
                    {"tokenizer.json", tokenizer_json(model, options).dump(1)},
                    {"tokenizer_config.json", config.dump(2) + "\n"}});
}

}  // namespace moegraft::tokenizer
