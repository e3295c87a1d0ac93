#include "moegraft/model/batch.h"

#include "libtorch.h"

#include <algorithm>
#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/model/device.h"

namespace moegraft::model {
namespace {

// Positions by group, as index tensors on `device`. group_of(t): the group of position t, -1 for none.
template <class GroupOf>
std::vector<at::Tensor> group(int64_t T, int64_t num_groups, at::Device device, const GroupOf& group_of) {
  std::vector<int64_t> counts(num_groups, 0), next(num_groups, 0);
  for (int64_t t = 0; t < T; ++t)
    if (const int64_t g = group_of(t); g >= 0) ++counts[g];
  std::vector<at::Tensor> out;
  std::vector<int64_t*> data;
  for (int64_t g = 0; g < num_groups; ++g) {
    out.push_back(at::empty({counts[g]}, at::kLong));
    data.push_back(out.back().mutable_data_ptr<int64_t>());
  }
  for (int64_t t = 0; t < T; ++t)
    if (const int64_t g = group_of(t); g >= 0) data[g][next[g]++] = t;
  for (at::Tensor& indices : out) indices = indices.to(device);
  return out;
}

// The set of an id: 0 for the base's. At most a handful of sets.
int64_t set_of(const std::vector<int64_t>& bounds, int64_t id) {
  int64_t s = 0;
  while (id >= bounds[s + 1]) ++s;
  return s;
}

at::Tensor on_host(const at::Tensor& t) { return t.defined() ? t.to(at::kCPU).contiguous() : t; }
// Without the positions: only a cut needs them.
PackedBatch on_host(const PackedBatch& batch) {
  return {on_host(batch.ids_T), on_host(batch.modality_T), {}, batch.cu_seqlens, on_host(batch.labels_T)};
}

// Of a batch on the host, but for `split`; index tensors land on `device`.
BatchFacts describe(const PackedBatch& batch, std::vector<int64_t> id_bounds, at::Device device) {
  const int64_t T = batch.num_tokens();
  MOEGRAFT_INVARIANT(id_bounds.size() >= 2 && id_bounds[0] == 0 && std::is_sorted(id_bounds.begin(), id_bounds.end()),
                     "id bounds ", id_bounds);
  MOEGRAFT_INVARIANT(!batch.cu_seqlens.empty() && batch.cu_seqlens.back() == T, "PackedBatch does not span its ", T,
                     " tokens");
  const int64_t sets = int64_t(id_bounds.size()) - 1, vocabulary = id_bounds.back();
  BatchFacts facts;

  const int64_t* ids = batch.ids_T.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t)
    MOEGRAFT_CHECK(ids[t] >= 0 && ids[t] < vocabulary, "token id ", ids[t], " is outside the vocabulary [0, ",
                   vocabulary, ")");
  facts.id_tokens = group(T, sets, device, [&](int64_t t) { return set_of(id_bounds, ids[t]); });

  if (batch.labels_T.defined()) {
    const int64_t* labels = batch.labels_T.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < T; ++t) {
      MOEGRAFT_CHECK(labels[t] < vocabulary, "label ", labels[t], " is outside the vocabulary [0, ", vocabulary, ")");
      facts.num_labels += labels[t] >= 0;
    }
    facts.label_tokens =
        group(T, sets, device, [&](int64_t t) { return labels[t] < 0 ? -1 : set_of(id_bounds, labels[t]); });
  }

  const int64_t* modality = batch.modality_T.defined() ? batch.modality_T.const_data_ptr<int64_t>() : nullptr;
  const auto modality_at = [&](int64_t t) { return modality ? modality[t] : 0; };
  for (int64_t t = 0; t < T; ++t) {
    MOEGRAFT_CHECK(modality_at(t) >= 0, "modality ", modality_at(t), " of token ", t, " is negative");
    facts.num_modalities = std::max(facts.num_modalities, modality_at(t) + 1);
  }
  facts.modality_tokens = group(T, facts.num_modalities, device, modality_at);

  at::Tensor cu_seqlens = at::empty({batch.num_sequences() + 1}, at::kInt);
  std::copy(batch.cu_seqlens.begin(), batch.cu_seqlens.end(), cu_seqlens.mutable_data_ptr<int32_t>());
  facts.cu_seqlens = cu_seqlens.to(device);
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], end = batch.cu_seqlens[i + 1];
    int64_t t = begin;
    while (t < end && modality_at(t) == 0) facts.text_prefix_ids.push_back(ids[t++]);
    facts.text_prefix.push_back(t - begin);
    facts.longest = std::max(facts.longest, end - begin);
  }
  facts.id_bounds = std::move(id_bounds);
  return facts;
}

// The given tokens of a batch on the host.
PackedBatch take(const PackedBatch& batch, const BatchFacts& whole, const std::vector<int64_t>& tokens,
                 std::vector<int64_t> cu_seqlens) {
  const auto taken = [&](const at::Tensor& from) {
    if (!from.defined()) return from;
    at::Tensor to = at::empty({int64_t(tokens.size())}, at::kLong);
    for (size_t i = 0; i < tokens.size(); ++i)
      to.mutable_data_ptr<int64_t>()[i] = from.const_data_ptr<int64_t>()[tokens[i]];
    return to;
  };
  PackedBatch part{taken(batch.ids_T), taken(batch.modality_T), taken(batch.positions_T), std::move(cu_seqlens),
                   taken(batch.labels_T)};
  BatchFacts facts = describe(part, whole.id_bounds, at::kCPU);
  facts.longest = whole.longest;  // of the whole sequence: some rotary scalings ask for it
  part.facts = std::make_shared<const BatchFacts>(std::move(facts));
  return part;
}

// `host`: on_host(batch). Lands on the batch's device.
SplitBatch split(const PackedBatch& batch, PackedBatch host, const BatchFacts& facts) {
  host.positions_T = on_host(batch.positions_T);
  std::vector<int64_t> prefix, rest, cu_prefix{0}, cu_rest{0};
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], cut = begin + facts.text_prefix[i], end = batch.cu_seqlens[i + 1];
    for (int64_t t = begin; t < cut; ++t) prefix.push_back(t);
    for (int64_t t = cut; t < end; ++t) rest.push_back(t);
    cu_prefix.push_back(int64_t(prefix.size()));
    cu_rest.push_back(int64_t(rest.size()));
  }
  const auto indices = [](const std::vector<int64_t>& tokens) {
    return at::tensor(at::ArrayRef<int64_t>(tokens), at::kLong);
  };
  return to_device({take(host, facts, prefix, std::move(cu_prefix)), take(host, facts, rest, std::move(cu_rest)),
                    indices(prefix), indices(rest)},
                   batch.ids_T.device());
}

}  // namespace

BatchFacts describe_batch(const PackedBatch& batch, std::vector<int64_t> id_bounds) {
  const PackedBatch host = on_host(batch);
  BatchFacts facts = describe(host, std::move(id_bounds), batch.ids_T.device());
  if (host.labels_T.defined() && prefix_is_worth_it(facts, host.num_tokens()))
    facts.split = std::make_shared<const SplitBatch>(split(batch, host, facts));
  return facts;
}

SplitBatch split_prefix(const PackedBatch& batch) { return split(batch, on_host(batch), *batch.facts); }

bool prefix_is_worth_it(const BatchFacts& facts, int64_t num_tokens) {
  const int64_t tokens = std::accumulate(facts.text_prefix.begin(), facts.text_prefix.end(), int64_t{0});
  return tokens >= 16 && 16 * tokens >= num_tokens;
}

}  // namespace moegraft::model
