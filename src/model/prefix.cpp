#include "prefix.h"

#include "libtorch.h"

#include <numeric>

namespace moegraft::model {
namespace {

PackedBatch take(const PackedBatch& batch, const at::Tensor& tokens, std::vector<int64_t> cu_seqlens, const std::vector<int64_t>& id_bounds) {
  PackedBatch part;
  part.ids_T = batch.ids_T.index_select(0, tokens);
  if (batch.modality_T.defined()) part.modality_T = batch.modality_T.index_select(0, tokens);
  part.positions_T = batch.positions_T.index_select(0, tokens);
  if (batch.labels_T.defined()) part.labels_T = batch.labels_T.index_select(0, tokens);
  part.cu_seqlens = std::move(cu_seqlens);
  BatchFacts facts = describe_batch(part, id_bounds);
  facts.longest = batch.facts->longest;  // of the whole sequence: some rotary scalings ask for it
  part.facts = std::make_shared<BatchFacts>(std::move(facts));
  return part;
}

}  // namespace

SplitBatch split_prefix(const PackedBatch& batch, const std::vector<int64_t>& id_bounds) {
  std::vector<int64_t> prefix, rest, cu_prefix{0}, cu_rest{0};
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], cut = begin + batch.facts->text_prefix[i], end = batch.cu_seqlens[i + 1];
    for (int64_t t = begin; t < cut; ++t) prefix.push_back(t);
    for (int64_t t = cut; t < end; ++t) rest.push_back(t);
    cu_prefix.push_back(int64_t(prefix.size()));
    cu_rest.push_back(int64_t(rest.size()));
  }
  SplitBatch split;
  split.prefix_tokens = at::tensor(prefix, at::kLong).to(batch.ids_T.device());
  split.rest_tokens = at::tensor(rest, at::kLong).to(batch.ids_T.device());
  split.prefix = take(batch, split.prefix_tokens, std::move(cu_prefix), id_bounds);
  split.rest = take(batch, split.rest_tokens, std::move(cu_rest), id_bounds);
  return split;
}

bool prefix_is_worth_it(const BatchFacts& facts, int64_t num_tokens) {
  const int64_t tokens = std::accumulate(facts.text_prefix.begin(), facts.text_prefix.end(), int64_t{0});
  return tokens >= 16 && 16 * tokens >= num_tokens;
}

}  // namespace moegraft::model
