#pragma once
// Text tokenizers. Ids equal those of the `tokenizers` and `sentencepiece` packages.
// A loaded tokenizer is immutable: encode and decode may be called from several threads at once.

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

  // UTF-8 text to ids in [0, size()). Bytes that are not UTF-8 become U+FFFD first. Texts of special tokens ("<s>",
  // "<|im_end|>") listed in added_tokens become their ids; in a plain sentencepiece model they are ordinary text.
  // add_special: with the tokenizer's own BOS/EOS template (tokenizer.json post_processor; sentencepiece:
  // add_bos_token/add_eos_token of tokenizer_config.json, by default BOS only). UserError when the text holds what the
  // model cannot express (no unk token).
  virtual std::vector<int64_t> encode(std::string_view text, bool add_special = false) const = 0;
  // Ids to text; skip_special leaves special tokens out. UserError on an id outside the vocabulary.
  virtual std::string decode(const std::vector<int64_t>& ids, bool skip_special = true) const = 0;
  virtual int64_t size() const = 0;                         // largest id + 1, added tokens included
  virtual int64_t id_of(std::string_view piece) const = 0;  // -1 when absent
  virtual std::string piece_of(int64_t id) const = 0;       // UserError when out of range
  virtual int64_t bos_id() const = 0;                       // -1 when absent
  virtual int64_t eos_id() const = 0;
};

// Loads a model directory: tokenizer.json, else tokenizer.model; a path to one of these files works too.
// tokenizer_config.json names BOS and EOS. A tokenizer.json whose model is not BPE (Unigram) falls back to the
// tokenizer.model beside it. UserError names what is missing or not supported.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);

struct SentencePieceTraining {
  std::string model_type = "bpe";  // bpe | unigram
  int64_t vocab_size = 2048;
  double character_coverage = 0.9995;
  bool byte_fallback = true;
  bool add_dummy_prefix = true;  // a space before each text, as in Llama and Mixtral
  bool split_digits = true;      // one piece per digit
  int64_t max_sentences = 0;     // 0: all; otherwise a uniform sample drawn by `seed`
  int64_t seed = 0;
};
// Trains on text files (one sentence a line) and writes <dir>/tokenizer.model, and tokenizer.json and
// tokenizer_config.json so that transformers.AutoTokenizer gives the same ids. Ids: <unk> 0, <s> 1, </s> 2, then
// (byte_fallback) the 256 bytes. The text is not normalised and spaces are kept, so decode(encode(x)) == x. The same
// files and options give the same bytes. UsageError: bad options; UserError: no text, a vocabulary larger than the text
// allows, a folder that cannot be written.
void train_sentencepiece(const std::vector<std::filesystem::path>& text_files, const std::filesystem::path& dir,
                         const SentencePieceTraining& options);

}  // namespace moegraft::tokenizer
