#pragma once
// Captions come back every epoch, and what a frozen base makes of one never changes: its keys and values, its final
// hidden states, and where its tokens were routed, kept by its ids. Each caption is computed as if it were alone (see
// cached_prefix in src/model/prefix.h), so its bits depend on neither its batch nor on what was kept before: a run that
// resumes with an empty cache goes on bit for bit.

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace moegraft::model {

struct DecoderSpec;
class WeightProvider;

class PrefixCache {
 public:
  // Letters as in model/spec.h; S tokens of the caption, L all layers, N those with experts.
  struct Entry {
    at::Tensor keys_LSGC, values_LSGC, hidden_SD;  // compute dtype
    at::Tensor probs_NSE, ids_NSK,
        weights_NSK;  // what a RoutingObserver is told: float32, int16, float32. Undefined without experts
    int64_t bytes() const;
  };
  using Ids = std::vector<int64_t>;

  // Keeps what comes first, up to this many bytes, and nothing that comes later: in epochs longer than the cache,
  // keeping the latest would keep what is not asked for again before it has gone.
  explicit PrefixCache(int64_t capacity_bytes) : capacity_(capacity_bytes) {}

  std::shared_ptr<const Entry> find(const Ids& ids) const;  // null: not here. Compares all ids
  void keep(const Ids& ids, std::shared_ptr<const Entry> entry);

  int64_t capacity() const { return capacity_; }
  int64_t bytes() const { return bytes_; }
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }

  // Tokens that captions asked for and those that were here, since the last call.
  struct Use {
    int64_t tokens = 0, found = 0;
  };
  Use take_use();
  void count(const Use& use) { use_.tokens += use.tokens, use_.found += use.found; }

  // Whether captions computed in one pass get the bits they have alone: asked of the machine once. The cache is of this
  // base from then on (InvariantError for another).
  bool may_share_a_pass(const DecoderSpec& spec, WeightProvider& weights);

 private:
  struct Hash {
    size_t operator()(const Ids& ids) const;
  };
  int64_t capacity_, bytes_ = 0;
  std::unordered_map<Ids, std::shared_ptr<const Entry>, Hash> entries_;
  const WeightProvider* weights_ = nullptr;
  bool may_share_ = false;
  Use use_;
};

}  // namespace moegraft::model
