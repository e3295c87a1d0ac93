#pragma once
// Byte-pair encoding of tokenizer.json's model: characters, then the merge of lowest rank first (leftmost of equals),
// until none applies.

#include <cstdint>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "field.h"

namespace moegraft::tokenizer {

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
template <class T>
using StringMap = std::unordered_map<std::string, T, StringHash, std::equal_to<>>;

class Bpe {
 public:
  explicit Bpe(const Field& model);

  // Appends the ids of one word. O(n log n). Thread-safe.
  void encode(std::string_view word, std::vector<int64_t>& ids) const;
  const StringMap<int32_t>& vocab() const { return vocab_; }

 private:
  struct Merge {
    int32_t rank, id;
  };
  void read_vocab(const Field& vocab);
  void read_merges(const Field& merges);
  std::vector<int32_t> characters(std::string_view word) const;
  void merge(std::vector<int32_t>& ids) const;
  static uint64_t pair_key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }

  StringMap<int32_t> vocab_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::vector<int32_t> byte_ids_;  // of <0x00> … <0xFF>, -1 when absent; empty without byte_fallback
  int32_t unk_id_ = -1;
  bool fuse_unk_, ignore_merges_;
  std::string prefix_, suffix_;  // continuing_subword_prefix, end_of_word_suffix

  mutable std::shared_mutex cache_mutex_;
  mutable StringMap<std::vector<int32_t>> cache_;
};

}  // namespace moegraft::tokenizer
