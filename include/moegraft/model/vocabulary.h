#pragma once
// Token ids of text and of the new modalities. New ids start at config.vocab_size (not at the tokenizer's length):
// begin = first_id, end = first_id + 1, code c = first_id + 2 + c; the next modality follows. With several codebooks
// the codes of one follow those of another, and place i of an item takes codes of codebook i % codebooks alone
// (codec/code_shape.h has the layout).

#include <cstdint>
#include <string>
#include <vector>

namespace moegraft::model {

struct ModalityTokens {
  std::string name;      // "image"
  int64_t modality = 1;  // its id in PackedBatch::modality_T
  int64_t first_id = 0;
  int64_t num_codes = 0;    // of all codebooks
  int64_t item_length = 0;  // codes an item has, begin and end not counted
  int64_t codebooks = 1;    // codes at each position of an item; divides num_codes and item_length

  int64_t begin_id() const { return first_id; }
  int64_t end_id() const { return first_id + 1; }
  int64_t code_id(int64_t code) const { return first_id + 2 + code; }
  int64_t num_rows() const { return num_codes + 2; }
  int64_t codebook_size() const { return num_codes / codebooks; }  // N
  int64_t first_code(int64_t place) const {
    return place % codebooks * codebook_size();
  }  // of the N codes that may stand at this place of an item
};

struct Vocabulary {
  int64_t text_size = 0;  // V
  int64_t bos_id = -1, eos_id = -1;
  std::vector<ModalityTokens> modalities;

  int64_t size() const {
    return modalities.empty() ? text_size : modalities.back().first_id + modalities.back().num_rows();
  }
  std::vector<int64_t> id_bounds()
      const;  // {0, V, V + rows of the first modality, …, size()}: what BatchFacts sorts ids by
  int64_t modality_of(int64_t id) const;                         // 0 for text; UserError when outside the vocabulary
  const ModalityTokens& by_name(const std::string& name) const;  // UserError names the known ones
};

}  // namespace moegraft::model
