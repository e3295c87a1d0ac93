#pragma once
// Text tokenizers. Ids equal those of the `tokenizers` and `sentencepiece` packages.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace moegraft::tokenizer {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Text to ids. add_special: with the tokenizer's own BOS/EOS template (tokenizer.json post_processor; sentencepiece: BOS when the model's config says so).
  virtual std::vector<int64_t> encode(std::string_view text, bool add_special = false) const = 0;
  virtual std::string decode(const std::vector<int64_t>& ids, bool skip_special = true) const = 0;
  virtual int64_t size() const = 0;
  virtual int64_t id_of(std::string_view piece) const = 0;  // -1 when absent
  virtual std::string piece_of(int64_t id) const = 0;       // UserError when out of range
  virtual int64_t bos_id() const = 0;                       // -1 when absent
  virtual int64_t eos_id() const = 0;
};

// Loads tokenizer.json, else tokenizer.model, from a model directory. UserError names what is missing or not supported.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& dir);

struct SentencePieceTraining {
  std::string model_type = "bpe";  // bpe | unigram
  int64_t vocab_size = 2048;
  double character_coverage = 0.9995;
  bool byte_fallback = true;
  int64_t max_sentences = 0;  // 0: all
  int64_t seed = 0;
};
// Trains on text files (one sentence a line) and writes <dir>/tokenizer.model (+ tokenizer_config.json so that transformers loads it).
void train_sentencepiece(const std::vector<std::filesystem::path>& text_files, const std::filesystem::path& dir, const SentencePieceTraining& options);

}  // namespace moegraft::tokenizer
