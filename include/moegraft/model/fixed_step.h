#pragma once
// Decoding a token at a time without the host in the loop.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/kernels/launch_graph.h"
#include "moegraft/model/decoder.h"

namespace moegraft::model {

// One token for each of the first `count` sequences of a cache, all of one modality and one set of ids. What changes
// between steps (ids, lengths, keys, values) lies in device memory of fixed address, so that every step launches the
// same operations: recorded once, they are replayed as one CUDA graph. Attention is over the cache's whole room,
// masked: equal to Decoder::forward's with the cache but for rounding. Decoder, cache and what is attached must stay as
// they are; the cache's sequences may be replaced or truncated between steps.
class FixedStep {
 public:
  using Head = std::function<at::Tensor(const at::Tensor& hidden_BD)>;  // runs as a part of the step; wait for nothing

  // record: as a graph; otherwise operation by operation. UsageError where obstacle() says why it cannot be recorded.
  FixedStep(const Decoder& decoder, KvCache& cache, int64_t count, int64_t modality, Head head, bool record);
  static std::string obstacle(const Decoder& decoder);

  // Feeds ids [count]. Returns what head made of the hidden states, valid until the next call. UserError: an id of
  // another set than the first call's, or a sequence that has no room left.
  at::Tensor operator()(const std::vector<int64_t>& ids);

 private:
  void prepare(const std::vector<int64_t>& ids);
  void run();

  const Decoder& decoder_;
  KvCache& cache_;
  const Head head_;
  const bool record_;
  const FactorCaches factors_;
  PackedBatch batch_;  // of the memory that every step reads
  at::Tensor lengths_B_, out_;
  std::vector<int64_t> lengths_;  // what lengths_B_ holds
  std::pair<int64_t, int64_t> id_range_;
  std::optional<kernels::LaunchGraph> graph_;
};

}  // namespace moegraft::model
