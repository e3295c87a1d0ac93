#include "moegraft/model/prefix_cache.h"

#include "libtorch.h"

#include <algorithm>
#include <map>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/model/device.h"
#include "prefix.h"

namespace moegraft::model {

int64_t PrefixCache::Entry::bytes() const {
  int64_t total = 0;
  for (const auto* t : {&keys_LSGC, &values_LSGC, &hidden_SD, &probs_NSE, &ids_NSK, &weights_NSK})
    if (t->defined()) total += int64_t(t->nbytes());
  return total;
}

size_t PrefixCache::Hash::operator()(const Ids& ids) const {
  uint64_t h = ids.size();
  for (const int64_t id : ids) h = (h ^ uint64_t(id)) * 0x9E3779B97F4A7C15ull, h ^= h >> 29;
  return size_t(h);
}

std::shared_ptr<const PrefixCache::Entry> PrefixCache::find(const Ids& ids) const {
  const auto it = entries_.find(ids);
  return it == entries_.end() ? nullptr : it->second;
}

void PrefixCache::keep(const Ids& ids, std::shared_ptr<const Entry> entry) {
  const int64_t bytes = entry->bytes() + int64_t(ids.size() * sizeof(int64_t));
  if (bytes_ + bytes > capacity_ || !entries_.emplace(ids, std::move(entry)).second) return;
  bytes_ += bytes;
}

PrefixCache::Use PrefixCache::take_use() { return std::exchange(use_, {}); }

bool PrefixCache::may_share_a_pass(const DecoderSpec& spec, WeightProvider& weights) {
  MOEGRAFT_INVARIANT(!weights_ || weights_ == &weights, "a prefix cache serves one base");
  if (weights_) return may_share_;
  weights_ = &weights;
  may_share_ = weights.device().is_cpu();
  for (int64_t l = 0; l < spec.num_layers && may_share_; ++l) {
    const AttentionWeights a = weights.layer(l).attention;
    // A dense layer's or a shared expert's activation, and routers' other than a softmax's top k, are the library's,
    // whose bits depend on where a row lies.
    may_share_ = spec.layers[size_t(l)].sparse && spec.router.is_plain() && spec.shared_expert.intermediate_size == 0 &&
                 a.q.packed() && a.k.packed() && a.v.packed() && a.o.packed() &&
                 weights.experts(l, 0, spec.num_experts).panels;
  }
  if (may_share_) {
    std::vector<int64_t> depths{spec.hidden_size, spec.num_heads * spec.head_dim, spec.moe_intermediate_size,
                                spec.head_dim};
    for (int64_t keys = 64; keys <= 512; keys += 64) depths.push_back(keys);  // of attention
    std::sort(depths.begin(), depths.end());
    depths.erase(std::unique(depths.begin(), depths.end()), depths.end());
    may_share_ = kernels::rows_stand_alone(weights.dtype(), depths);
  }
  return may_share_;
}

namespace {

using Entry = PrefixCache::Entry;
using Ids = PrefixCache::Ids;

// Keeps what it is told.
class Recorder : public RoutingObserver {
 public:
  void observe(int64_t, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK, const at::Tensor& topk_weights_TK,
               const at::Tensor&) override {
    probs_.push_back(probs_TE);
    ids_.push_back(topk_ids_TK.to(at::kShort));
    weights_.push_back(topk_weights_TK.to(at::kFloat));
  }
  bool any() const { return !probs_.empty(); }
  at::Tensor probs() const { return at::stack(probs_); }
  at::Tensor ids() const { return at::stack(ids_); }
  at::Tensor weights() const { return at::stack(weights_); }

 private:
  std::vector<at::Tensor> probs_, ids_, weights_;
};

PackedBatch pack_captions(const std::vector<Ids>& captions, at::Device device, const std::vector<int64_t>& id_bounds) {
  std::vector<int64_t> ids, positions;
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (const Ids& caption : captions) {
    ids.insert(ids.end(), caption.begin(), caption.end());
    for (size_t i = 0; i < caption.size(); ++i) positions.push_back(int64_t(i));
    batch.cu_seqlens.push_back(int64_t(ids.size()));
  }
  batch.ids_T = at::tensor(ids, at::kLong);
  batch.positions_T = at::tensor(positions, at::kLong);
  batch.facts =
      std::make_shared<BatchFacts>(describe_batch(batch, id_bounds));  // on the host, which need not wait then
  return to_device(batch, device);
}

// One pass over `captions`, each with the bits it has alone if the pass gives them.
std::vector<std::shared_ptr<const Entry>> compute(const std::vector<Ids>& captions, at::Device device,
                                                  const std::vector<int64_t>& id_bounds, const ForwardOptions& options,
                                                  const RunPrefix& run) {
  const PackedBatch batch = pack_captions(captions, device, id_bounds);
  Recorder recorder;
  ForwardOptions inner = options;
  inner.routing = &recorder;
  const auto keys = std::make_shared<PastKeys>();
  keys->cu_seqlens = batch.cu_seqlens;
  Entry all;
  all.hidden_SD = run(batch, inner, keys);
  all.keys_LSGC = at::stack(keys->keys);
  all.values_LSGC = at::stack(keys->values);
  if (recorder.any())
    all.probs_NSE = recorder.probs(), all.ids_NSK = recorder.ids(), all.weights_NSK = recorder.weights();
  std::vector<std::shared_ptr<const Entry>> out;
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], count = batch.cu_seqlens[i + 1] - begin;
    const auto part = [&](const at::Tensor& t, int64_t dim) {
      return t.defined() ? t.narrow(dim, begin, count).clone(at::MemoryFormat::Contiguous) : t;
    };
    out.push_back(
        std::make_shared<Entry>(Entry{part(all.keys_LSGC, 1), part(all.values_LSGC, 1), part(all.hidden_SD, 0),
                                      part(all.probs_NSE, 1), part(all.ids_NSK, 1), part(all.weights_NSK, 1)}));
  }
  return out;
}

// The tokens of sequence i, for every i in `which`, as a batch.
PackedBatch take_sequences(const PackedBatch& batch, const std::vector<int64_t>& which) {
  std::vector<Ids> captions;
  for (const int64_t i : which)
    captions.emplace_back(batch.facts->text_prefix_ids.begin() + batch.cu_seqlens[i],
                          batch.facts->text_prefix_ids.begin() + batch.cu_seqlens[i + 1]);
  return pack_captions(captions, batch.ids_T.device(), batch.facts->id_bounds);
}

void tell(RoutingObserver& observer, const DecoderSpec& spec,
          const std::vector<std::shared_ptr<const Entry>>& captions) {
  const auto joined = [&](at::Tensor Entry::* field) {
    std::vector<at::Tensor> parts;
    for (const auto& c : captions) parts.push_back((*c).*field);
    return at::cat(parts, 1);
  };
  const at::Tensor probs = joined(&Entry::probs_NSE), ids = joined(&Entry::ids_NSK).to(at::kLong),
                   weights = joined(&Entry::weights_NSK);
  for (int64_t l = 0, n = 0; l < spec.num_layers; ++l)
    if (spec.layers[size_t(l)].sparse) observer.observe(l, probs[n], ids[n], weights[n], {}), ++n;
}

}  // namespace

PrefixPass cached_prefix(PrefixCache& cache, const DecoderSpec& spec, WeightProvider& weights, const SplitBatch& split,
                         const ForwardOptions& options, const RunPrefix& run) {
  const PackedBatch& prefix = split.prefix;
  const std::vector<int64_t>& cu = prefix.cu_seqlens;
  const auto& all_ids = prefix.facts->text_prefix_ids;
  const int64_t B = prefix.num_sequences();

  // Who asks for what. What is new is computed once, however many ask.
  std::vector<int64_t> texts;
  std::unordered_map<int64_t, size_t> fresh_of;  // sequence -> index in fresh
  std::vector<Ids> fresh;
  std::vector<std::shared_ptr<const Entry>> entry_of(static_cast<size_t>(B));
  PrefixCache::Use use;
  std::map<Ids, size_t> known_fresh;
  for (int64_t i = 0; i < B; ++i) {
    const int64_t count = cu[i + 1] - cu[i];
    if (count == 0) continue;
    if (split.rest.cu_seqlens[i + 1] == split.rest.cu_seqlens[i]) {
      texts.push_back(i);
      continue;
    }
    use.tokens += count;
    const Ids ids(all_ids.begin() + cu[i], all_ids.begin() + cu[i + 1]);
    if ((entry_of[size_t(i)] = cache.find(ids))) {
      use.found += count;
      continue;
    }
    const auto [at, is_new] = known_fresh.emplace(ids, fresh.size());
    if (is_new) fresh.push_back(ids);
    fresh_of[i] = at->second;
  }
  cache.count(use);

  const at::Device device = prefix.ids_T.device();
  std::vector<std::shared_ptr<const Entry>> computed;
  if (cache.may_share_a_pass(spec, weights)) {
    if (!fresh.empty()) computed = compute(fresh, device, prefix.facts->id_bounds, options, run);
  } else {
    for (const Ids& ids : fresh)
      computed.push_back(compute({ids}, device, prefix.facts->id_bounds, options, run).front());
  }
  for (size_t n = 0; n < fresh.size(); ++n) cache.keep(fresh[n], computed[n]);
  for (const auto& [i, n] : fresh_of) entry_of[size_t(i)] = computed[n];

  at::Tensor text_hidden;
  if (!texts.empty()) {
    ForwardOptions plain = options;
    plain.prefix_cache = nullptr;
    text_hidden = run(take_sequences(prefix, texts), plain, nullptr);
  }

  auto past = std::make_shared<PastKeys>();
  past->cu_seqlens = {0};
  std::vector<at::Tensor> hidden, keys, values;
  std::vector<std::shared_ptr<const Entry>> entries;
  for (int64_t i = 0, text_row = 0; i < B; ++i) {
    const int64_t count = cu[i + 1] - cu[i];
    if (const auto& entry = entry_of[size_t(i)]) {
      hidden.push_back(entry->hidden_SD);
      keys.push_back(entry->keys_LSGC);
      values.push_back(entry->values_LSGC);
      entries.push_back(entry);
      past->cu_seqlens.push_back(past->cu_seqlens.back() + count);
    } else {
      if (count > 0) hidden.push_back(text_hidden.narrow(0, text_row, count)), text_row += count;
      past->cu_seqlens.push_back(past->cu_seqlens.back());
    }
  }
  if (entries.empty()) {
    const auto none =
        at::empty({0, spec.num_kv_heads, spec.head_dim}, at::TensorOptions(weights.dtype()).device(device));
    past->keys.assign(size_t(spec.num_layers), none);
    past->values = past->keys;
  } else {
    past->keys = at::cat(keys, 1).unbind(0);
    past->values = at::cat(values, 1).unbind(0);
    if (options.routing && entries.front()->probs_NSE.defined()) tell(*options.routing, spec, entries);
  }
  return {at::cat(hidden), std::move(past)};
}

}  // namespace moegraft::model
