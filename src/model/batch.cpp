#include "moegraft/model/batch.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/check.h"

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

}  // namespace

BatchFacts describe_batch(const PackedBatch& batch, std::vector<int64_t> id_bounds) {
  const int64_t T = batch.num_tokens();
  const at::Device device = batch.ids_T.device();
  MOEGRAFT_INVARIANT(id_bounds.size() >= 2 && id_bounds[0] == 0 && std::is_sorted(id_bounds.begin(), id_bounds.end()), "id bounds ", id_bounds);
  MOEGRAFT_INVARIANT(!batch.cu_seqlens.empty() && batch.cu_seqlens.back() == T, "PackedBatch does not span its ", T, " tokens");
  const auto on_host = [](const at::Tensor& t) { return t.to(at::kCPU).contiguous(); };
  const int64_t sets = int64_t(id_bounds.size()) - 1, vocabulary = id_bounds.back();
  BatchFacts facts;

  const at::Tensor ids_T = on_host(batch.ids_T);
  const int64_t* ids = ids_T.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t) MOEGRAFT_CHECK(ids[t] >= 0 && ids[t] < vocabulary, "token id ", ids[t], " is outside the vocabulary [0, ", vocabulary, ")");
  facts.id_tokens = group(T, sets, device, [&](int64_t t) { return set_of(id_bounds, ids[t]); });

  if (batch.labels_T.defined()) {
    const at::Tensor labels_T = on_host(batch.labels_T);
    const int64_t* labels = labels_T.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < T; ++t) {
      MOEGRAFT_CHECK(labels[t] < vocabulary, "label ", labels[t], " is outside the vocabulary [0, ", vocabulary, ")");
      facts.num_labels += labels[t] >= 0;
    }
    facts.label_tokens = group(T, sets, device, [&](int64_t t) { return labels[t] < 0 ? -1 : set_of(id_bounds, labels[t]); });
  }

  const at::Tensor modality_T = batch.modality_T.defined() ? on_host(batch.modality_T) : at::Tensor();
  const int64_t* modality = modality_T.defined() ? modality_T.const_data_ptr<int64_t>() : nullptr;
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

}  // namespace moegraft::model
