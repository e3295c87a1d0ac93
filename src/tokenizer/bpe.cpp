#include "bpe.h"

#include <cstdio>
#include <limits>
#include <mutex>
#include <queue>

#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

constexpr size_t kMaxCachedWords = 1 << 16;
constexpr size_t kMaxCachedBytes = 128;
constexpr size_t kMaxAffix = 64;  // bytes; copied for each character

}  // namespace

Bpe::Bpe(const Field& model)
    : fuse_unk_(model.boolean_or("fuse_unk", false)), ignore_merges_(model.boolean_or("ignore_merges", false)) {
  if (model.has("dropout")) {
    const auto& dropout = model.at("dropout").value();
    model.at("dropout").expect(dropout.is_number() && dropout.get<double>() == 0,
                               "null or 0 (random merges are for training and not supported)");
  }
  prefix_ = model.string_or("continuing_subword_prefix", "");
  suffix_ = model.string_or("end_of_word_suffix", "");
  for (const auto& [key, text] : {std::pair{"continuing_subword_prefix", &prefix_}, {"end_of_word_suffix", &suffix_}})
    MOEGRAFT_CHECK(text->size() <= kMaxAffix, model.place(), ".", key, ": expected at most ", kMaxAffix, " bytes, got ",
                   text->size());
  read_vocab(model.at("vocab"));
  read_merges(model.at("merges"));
  if (model.has("unk_token")) {
    const auto unk = vocab_.find(model.at("unk_token").string());
    model.at("unk_token").expect(unk != vocab_.end(), "a token of the vocabulary");
    unk_id_ = unk->second;
  }
  if (model.boolean_or("byte_fallback", false)) {
    byte_ids_.assign(256, -1);
    for (int byte = 0; byte < 256; ++byte) {
      char name[8];
      std::snprintf(name, sizeof name, "<0x%02X>", byte);
      if (const auto it = vocab_.find(std::string_view(name)); it != vocab_.end())
        byte_ids_[static_cast<size_t>(byte)] = it->second;
    }
  }
}

void Bpe::read_vocab(const Field& vocab) {
  vocab.expect(vocab.value().is_object() && !vocab.value().empty(), "an object of tokens and ids");
  vocab_.reserve(vocab.value().size());
  for (const auto& [token, id] : vocab.value().items()) {
    const bool good = id.is_number_integer() && id >= 0 && id < std::numeric_limits<int32_t>::max();
    MOEGRAFT_CHECK(good, vocab.place(), "['", shortened(token), "']: expected an id, an integer ≥ 0, got ",
                   shortened(id.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
    vocab_.emplace(token, id.get<int32_t>());
  }
}

void Bpe::read_merges(const Field& merges) {
  merges.expect(merges.value().is_array(), "an array of merges");
  const auto id_of = [&](std::string_view token, size_t rank) {
    const auto it = vocab_.find(token);
    MOEGRAFT_CHECK(it != vocab_.end(), merges.place(), "[", rank, "]: the token '", std::string(token),
                   "' is not in the vocabulary");
    return it->second;
  };
  const auto& list = merges.value();
  merges_.reserve(list.size());
  size_t rank = 0;
  for (const auto& entry : list) {
    const std::string* whole = entry.get_ptr<const nlohmann::json::string_t*>();
    std::string_view left, right;
    if (whole) {
      const size_t space = whole->find(' ');
      const bool pair = space != std::string::npos && whole->find(' ', space + 1) == std::string::npos;
      MOEGRAFT_CHECK(pair, merges.place(), "[", rank, "]: expected two tokens with a space between them, got '", *whole,
                     "'");
      left = std::string_view(*whole).substr(0, space);
      right = std::string_view(*whole).substr(space + 1);
    } else {
      const bool pair = entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string();
      MOEGRAFT_CHECK(pair, merges.place(), "[", rank, "]: expected a pair of tokens or the string \"left right\"");
      left = entry[0].get_ref<const std::string&>();
      right = entry[1].get_ref<const std::string&>();
    }
    const int32_t left_id = id_of(left, rank), right_id = id_of(right, rank);
    MOEGRAFT_CHECK(right.size() >= prefix_.size(), merges.place(), "[", rank,
                   "]: the right token is shorter than continuing_subword_prefix");
    const int32_t merged = id_of(std::string(left) + std::string(right.substr(prefix_.size())), rank);
    merges_[pair_key(left_id, right_id)] = {static_cast<int32_t>(rank), merged};
    ++rank;
  }
}

std::vector<int32_t> Bpe::characters(std::string_view word) const {
  std::vector<int32_t> ids;
  ids.reserve(word.size());
  int32_t pending = -1;  // an unknown token not yet written: the next unknown character may fuse with it
  std::string decorated;
  for (size_t i = 0; i < word.size();) {
    const size_t length = utf8_length(static_cast<unsigned char>(word[i]));
    std::string_view token = word.substr(i, length);
    const bool first = i == 0, last = i + length >= word.size();
    i += length;
    if ((!first && !prefix_.empty()) || (last && !suffix_.empty())) {
      decorated = (first ? "" : prefix_) + std::string(token) + (last ? suffix_ : "");
      token = decorated;
    }
    if (const auto it = vocab_.find(token); it != vocab_.end()) {
      if (pending >= 0) ids.push_back(pending);
      pending = -1;
      ids.push_back(it->second);
      continue;
    }
    if (!byte_ids_.empty()) {
      bool all = true;
      for (const char c : token) all = all && byte_ids_[static_cast<unsigned char>(c)] >= 0;
      if (all) {
        for (const char c : token) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
        continue;
      }
    }
    if (unk_id_ < 0) continue;  // the package drops such characters too
    if (pending >= 0 && !fuse_unk_) ids.push_back(pending);
    pending = unk_id_;
  }
  if (pending >= 0) ids.push_back(pending);
  return ids;
}

void Bpe::merge(std::vector<int32_t>& ids) const {
  struct Symbol {
    int32_t id, previous, next;
  };
  struct Candidate {
    int32_t rank, position, id;
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  MOEGRAFT_CHECK(ids.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()), "a word of ", ids.size(),
                 " characters is too long for BPE");
  const auto count = static_cast<int32_t>(ids.size());
  std::vector<Symbol> symbols(ids.size());
  std::vector<Candidate> heap;
  heap.reserve(ids.size());
  const auto candidate = [&](int32_t left, int32_t right, auto push) {
    const auto it =
        merges_.find(pair_key(symbols[static_cast<size_t>(left)].id, symbols[static_cast<size_t>(right)].id));
    if (it != merges_.end()) push(Candidate{it->second.rank, left, it->second.id});
  };
  for (int32_t i = 0; i < count; ++i)
    symbols[static_cast<size_t>(i)] = {ids[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1};
  for (int32_t i = 0; i + 1 < count; ++i) candidate(i, i + 1, [&](Candidate c) { heap.push_back(c); });
  std::priority_queue<Candidate> queue({}, std::move(heap));

  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(top.position)];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    // The pair may have changed since it was queued.
    const auto now = merges_.find(pair_key(left.id, right.id));
    if (now == merges_.end() || now->second.id != top.id) continue;
    left.id = top.id;
    right.id = -1;
    left.next = right.next;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].previous = top.position;
    const auto push = [&](Candidate c) { queue.push(c); };
    if (left.previous >= 0) candidate(left.previous, top.position, push);
    if (left.next >= 0) candidate(top.position, left.next, push);
  }
  ids.clear();
  for (int32_t i = 0; i >= 0 && i < count; i = symbols[static_cast<size_t>(i)].next)
    ids.push_back(symbols[static_cast<size_t>(i)].id);
}

void Bpe::encode(std::string_view word, std::vector<int64_t>& ids) const {
  if (word.empty()) return;
  if (ignore_merges_) {
    if (const auto it = vocab_.find(word); it != vocab_.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  const bool cacheable = word.size() <= kMaxCachedBytes;
  if (cacheable) {
    std::shared_lock lock(cache_mutex_);
    if (const auto it = cache_.find(word); it != cache_.end()) {
      ids.insert(ids.end(), it->second.begin(), it->second.end());
      return;
    }
  }
  auto pieces = characters(word);
  merge(pieces);
  ids.insert(ids.end(), pieces.begin(), pieces.end());
  if (cacheable) {
    std::unique_lock lock(cache_mutex_);
    if (cache_.size() < kMaxCachedWords) cache_.emplace(word, std::move(pieces));
  }
}

}  // namespace moegraft::tokenizer
