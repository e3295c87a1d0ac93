// The forward pass. Control flow stays visible here; the arithmetic lives in kernels/.
#include "moegraft/model/decoder.h"

#include "libtorch.h"

#include <algorithm>
#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"
#include "rope.h"

namespace moegraft::model {
namespace {

namespace k = kernels;

// What every layer of one call shares.
struct Call {
  const PackedBatch& batch;
  const ForwardOptions& options;
  TokenDispatcher& dispatcher;
  const AdapterSites* adapters = nullptr;  // null: none, or the gate is closed
  int64_t num_groups = 1;                  // modalities that rows are sorted by
  at::Tensor modality_T;                   // defined when num_groups > 1
  std::vector<at::Tensor> rows_by_group;   // per group: the tokens' indices, for dense sites
  std::vector<int64_t> kv_lengths;         // with a cache: after this call
  RotaryTables rope;
};

// Does a term act on a group? With the gate open there is one group, and everything acts on it.
bool acts(const Call& call, const LowRank& term, int64_t group) {
  if (call.options.gate == Gate::all) return true;
  return std::find(term.modalities.begin(), term.modalities.end(), group) != term.modalities.end();
}

struct Projection {
  Site site;
  const at::Tensor &weight, &bias;
  const Panels& panels;
};

// Linear layers that share their input, each with the low-rank terms of its site.
std::vector<at::Tensor> project(const Call& call, int64_t layer, const at::Tensor& x_TX, std::initializer_list<Projection> projections) {
  std::vector<k::FrozenLinearWeight> weights;
  for (const auto& p : projections) weights.push_back({p.weight, p.bias, p.panels});
  std::vector<at::Tensor> out = k::frozen_linear(x_TX, weights);
  if (!call.adapters) return out;
  auto y = out.begin();
  for (const auto& p : projections) {
    for (const LowRank& term : call.adapters->at(layer, p.site)) {
      const at::Tensor A = term.A.to(x_TX.scalar_type()), B = term.B.to(x_TX.scalar_type());
      const auto delta = [&](const at::Tensor& x) { return at::linear(at::linear(x, A), B) * term.scale; };
      if (call.options.gate == Gate::all) {
        *y = *y + delta(x_TX);
        continue;
      }
      for (int64_t m = 0; m < call.num_groups; ++m) {
        if (!acts(call, term, m) || call.rows_by_group[m].size(0) == 0) continue;
        // Only the modality's rows are touched; each index occurs once, so the sum has one order.
        *y = y->index_add(0, call.rows_by_group[m], delta(x_TX.index_select(0, call.rows_by_group[m])));
      }
    }
    ++y;
  }
  return out;
}

std::vector<k::ExpertLowRank> expert_terms(const Call& call, int64_t layer, Site site) {
  std::vector<k::ExpertLowRank> out;
  if (!call.adapters) return out;
  for (const LowRank& term : call.adapters->at(layer, site)) {
    k::ExpertLowRank e{term.A, term.B, term.scale, {}};
    bool any = false;
    for (int64_t m = 0; m < call.num_groups; ++m) {
      const bool on = acts(call, term, m) && (call.options.gate == Gate::all || call.rows_by_group[m].size(0) > 0);
      e.acts.push_back(on);
      any |= on;
    }
    if (any) out.push_back(std::move(e));
  }
  return out;
}

struct Route {
  at::Tensor probs_TE, topk_ids_TK, topk_weights_TK;
};

// The residual stream and the router stay in float32 under a bf16 base: rounding them is what flips near-tied experts, and one flip moves a
// position's logits more than all other bf16 rounding together.
constexpr at::ScalarType kResidual = at::kFloat;

Route route(const DecoderSpec& spec, const at::Tensor& x_TD, const at::Tensor& router_ED) {
  const at::Tensor probs = at::softmax(at::linear(x_TD, router_ED.to(kResidual)), -1);
  const at::Tensor ids = std::get<1>(at::topk(probs.detach(), spec.num_experts_per_tok, -1));
  at::Tensor weights = probs.gather(1, ids);
  if (spec.norm_topk_prob) weights = weights / weights.sum(-1, true);
  return {probs, ids, weights};
}

}  // namespace

PackedBatch pack_rows(const at::Tensor& ids_BS) {
  MOEGRAFT_CHECK(ids_BS.dim() == 2 && ids_BS.scalar_type() == at::kLong, "input_ids must be int64 [B,S], got ", c10::toString(ids_BS.scalar_type()), " ", ids_BS.sizes().vec());
  const int64_t B = ids_BS.size(0), S = ids_BS.size(1);
  PackedBatch batch;
  batch.ids_T = ids_BS.reshape({-1}).contiguous();
  batch.positions_T = at::arange(S, at::TensorOptions(at::kLong).device(ids_BS.device())).repeat({B});
  for (int64_t b = 0; b <= B; ++b) batch.cu_seqlens.push_back(b * S);
  return batch;
}

KvCache::KvCache(const DecoderSpec& spec, int64_t num_sequences, int64_t max_length, at::ScalarType dtype, at::Device device)
    : lengths_(num_sequences, 0), max_length_(max_length) {
  const auto options = at::TensorOptions(dtype).device(device);
  for (int64_t l = 0; l < spec.num_layers; ++l) {
    keys.push_back(at::empty({num_sequences, max_length, spec.num_kv_heads, spec.head_dim}, options));
    values.push_back(at::empty({num_sequences, max_length, spec.num_kv_heads, spec.head_dim}, options));
  }
}

void KvCache::copy_sequence(int64_t target, const KvCache& other, int64_t source) {
  const int64_t length = other.lengths_.at(source);
  MOEGRAFT_INVARIANT(length <= max_length_, "KvCache::copy_sequence: ", length, " positions into room for ", max_length_);
  for (size_t l = 0; l < keys.size(); ++l) {
    keys[l][target].narrow(0, 0, length).copy_(other.keys[l][source].narrow(0, 0, length));
    values[l][target].narrow(0, 0, length).copy_(other.values[l][source].narrow(0, 0, length));
  }
  lengths_.at(target) = length;
}

Decoder::Decoder(BaseModel base) : base_(std::move(base)), dispatcher_(std::make_shared<LocalDispatcher>()) {
  MOEGRAFT_INVARIANT(base_.weights != nullptr, "Decoder needs weights");
}

void Decoder::attach(std::shared_ptr<const AdapterSites> adapters) { adapters_ = std::move(adapters); }

void Decoder::attach_rows(ModalityRows rows) {
  MOEGRAFT_INVARIANT(rows.first_id == total_vocab(), "new rows must continue the vocabulary at ", total_vocab(), ", got ", rows.first_id);
  MOEGRAFT_INVARIANT(rows.embedding_ND.size(1) == spec().hidden_size && rows.head_ND.sizes() == rows.embedding_ND.sizes(), "new rows ", rows.embedding_ND.sizes(), ", ", rows.head_ND.sizes());
  rows_.push_back(std::move(rows));
}

void Decoder::detach_all() {
  adapters_.reset();
  rows_.clear();
}

int64_t Decoder::total_vocab() const {
  int64_t total = spec().vocab_size;
  for (const auto& rows : rows_) total += rows.embedding_ND.size(0);
  return total;
}

namespace {

at::Tensor embed(const Decoder& decoder, WeightProvider& weights, const at::Tensor& ids_T) {
  const int64_t V = decoder.spec().vocab_size;
  // One reduction guards the vocabulary and tells whether new rows are needed at all.
  const int64_t largest = ids_T.numel() ? ids_T.max().item<int64_t>() : 0, smallest = ids_T.numel() ? ids_T.min().item<int64_t>() : 0;
  MOEGRAFT_CHECK(smallest >= 0 && largest < decoder.total_vocab(), "token id ", smallest < 0 ? smallest : largest, " is outside the vocabulary [0, ", decoder.total_vocab(), ")");
  if (largest < V) return at::embedding(weights.embedding_VD(), ids_T);
  at::Tensor x = at::embedding(weights.embedding_VD(), ids_T.masked_fill(ids_T >= V, 0));
  for (const auto& rows : decoder.rows()) {
    const at::Tensor at = ((ids_T >= rows.first_id) & (ids_T < rows.first_id + rows.embedding_ND.size(0))).nonzero().squeeze(1);
    if (at.size(0) == 0) continue;
    const at::Tensor picked = at::embedding(rows.embedding_ND, ids_T.index_select(0, at) - rows.first_id);
    x = x.index_copy(0, at, picked.to(x.scalar_type()));
  }
  return x;
}

Call make_call(const DecoderSpec& spec, const PackedBatch& batch, const ForwardOptions& options, TokenDispatcher& dispatcher, const AdapterSites* adapters) {
  const int64_t T = batch.num_tokens();
  MOEGRAFT_INVARIANT(batch.positions_T.size(0) == T && !batch.cu_seqlens.empty() && batch.cu_seqlens.back() == T, "PackedBatch does not span its ", T, " tokens");
  Call call{batch, options, dispatcher, options.gate == Gate::none ? nullptr : adapters, 1, {}, {}, {}, {}};
  if (batch.modality_T.defined() && options.gate == Gate::modality) {
    call.num_groups = batch.modality_T.numel() ? batch.modality_T.max().item<int64_t>() + 1 : 1;
    call.modality_T = batch.modality_T;
  }
  for (int64_t m = 0; m < call.num_groups; ++m)
    call.rows_by_group.push_back(call.num_groups > 1 ? (call.modality_T == m).nonzero().squeeze(1) : at::arange(T, batch.ids_T.options()));
  int64_t longest = 0;
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    int64_t length = batch.cu_seqlens[i + 1] - batch.cu_seqlens[i];
    if (options.cache) {
      length += options.cache->length(i);
      MOEGRAFT_CHECK(length <= options.cache->max_length(), "sequence ", i, " needs ", length, " positions, the cache holds ", options.cache->max_length());
      call.kv_lengths.push_back(length);
    }
    longest = std::max(longest, length);
  }
  call.rope = rotary_tables(spec, batch.positions_T, longest);
  return call;
}

at::Tensor attention(const DecoderSpec& spec, const Call& call, int64_t l, const AttentionWeights& w, const at::Tensor& x_TD) {
  const int64_t T = x_TD.size(0), H = spec.num_heads, G = spec.num_kv_heads, C = spec.head_dim;
  const auto qkv = project(call, l, x_TD, {{Site::q, w.q, w.q_bias, w.q_panels}, {Site::k, w.k, w.k_bias, w.k_panels}, {Site::v, w.v, w.v_bias, w.v_panels}});
  at::Tensor q = qkv[0], key = qkv[1], v = qkv[2];
  if (spec.qk_norm == QkNorm::full) {
    q = k::rms_norm(q, w.q_norm, spec.rms_norm_eps);
    key = k::rms_norm(key, w.k_norm, spec.rms_norm_eps);
  } else if (spec.qk_norm == QkNorm::per_head) {
    q = k::rms_norm(q.view({T, H, C}), w.q_norm, spec.rms_norm_eps);
    key = k::rms_norm(key.view({T, G, C}), w.k_norm, spec.rms_norm_eps);
  }
  if (spec.clip_qkv > 0) {
    q = q.clamp(-spec.clip_qkv, spec.clip_qkv);
    key = key.clamp(-spec.clip_qkv, spec.clip_qkv);
    v = v.clamp(-spec.clip_qkv, spec.clip_qkv);
  }
  q = k::rotary(q.view({T, H, C}), call.rope.cos_TC, call.rope.sin_TC);
  key = k::rotary(key.view({T, G, C}), call.rope.cos_TC, call.rope.sin_TC);
  v = v.view({T, G, C});
  const double scale = 1.0 / std::sqrt(double(C));
  const int64_t window = spec.layers[l].sliding_window;
  at::Tensor out;
  if (KvCache* cache = call.options.cache) {
    for (int64_t i = 0; i < call.batch.num_sequences(); ++i) {
      const int64_t begin = call.batch.cu_seqlens[i], count = call.batch.cu_seqlens[i + 1] - begin, past = call.kv_lengths[i] - count;
      cache->keys[l][i].narrow(0, past, count).copy_(key.narrow(0, begin, count));
      cache->values[l][i].narrow(0, past, count).copy_(v.narrow(0, begin, count));
    }
    out = k::cached_attention(q, cache->keys[l], cache->values[l], call.batch.cu_seqlens, call.kv_lengths, window, scale);
  } else {
    out = k::packed_attention(q, key, v, call.batch.cu_seqlens, call.batch.cu_seqlens, window, scale);
  }
  return project(call, l, out.reshape({T, H * C}), {{Site::o, w.o, w.o_bias, w.o_panels}})[0];
}

struct MoeResult {
  at::Tensor y_TD;
  at::Tensor counts_E, prob_sum_E;  // for the balance loss, when asked for
};

// x_TD: normed, in the experts' dtype; h_TD: the same in float32, for the router.
MoeResult moe(const DecoderSpec& spec, const Call& call, int64_t l, const at::Tensor& router_ED, const ExpertWeights& w, const at::Tensor& x_TD, const at::Tensor& h_TD) {
  const Route r = route(spec, h_TD, router_ED);
  if (call.options.routing) {
    at::NoGradGuard no_grad;
    call.options.routing->observe(l, r.probs_TE.detach(), r.topk_ids_TK, r.topk_weights_TK.detach(), call.batch.modality_T);
  }
  const TokenDispatcher::Routed routed = call.dispatcher.dispatch(x_TD, r.topk_ids_TK, r.topk_weights_TK, spec.num_experts, call.modality_T, call.num_groups);
  const k::ExpertFfnWeights weights{w.gate_FD, w.up_FD, w.down_DF, w.gate_EFD, w.up_EFD, w.down_EDF, w.panels};
  const k::ExpertFfnAdapters adapters{expert_terms(call, l, Site::gate), expert_terms(call, l, Site::up), expert_terms(call, l, Site::down)};
  at::Tensor hidden_RF;
  const at::Tensor out_XD = k::moe_ffn(routed.x_XD, routed.weights_XK, routed.dispatch, weights, adapters, call.options.sites ? &hidden_RF : nullptr);
  if (SiteObserver* sites = call.options.sites) {
    const auto offsets = routed.dispatch.host_offsets();
    sites->observe_experts(l, Site::gate, k::permute(routed.x_XD, routed.dispatch), offsets, call.num_groups);
    sites->observe_experts(l, Site::down, hidden_RF, offsets, call.num_groups);
  }
  MoeResult out{call.dispatcher.combine(out_XD, routed), {}, {}};
  if (call.options.aux_loss) {
    out.counts_E = at::bincount(r.topk_ids_TK.reshape({-1}), {}, spec.num_experts).to(at::kFloat);
    out.prob_sum_E = r.probs_TE.sum(0);
  }
  return out;
}

}  // namespace

ForwardResult Decoder::forward(const PackedBatch& batch, const ForwardOptions& options) const {
  const DecoderSpec& s = spec();
  WeightProvider& weights = *base_.weights;
  const Call call = make_call(s, batch, options, *dispatcher_, adapters_.get());
  at::Tensor x = embed(*this, weights, batch.ids_T).to(kResidual), delta, counts_E, prob_sum_E;  // the residual stream is x + delta
  int64_t sparse_layers = 0;
  for (int64_t l = 0; l < s.num_layers; ++l) {
    weights.prefetch(l + 1);
    const LayerWeights w = weights.layer(l);
    k::ResidualNorm n = k::residual_norm(x, delta, w.input_norm_D, s.rms_norm_eps, dtype());
    delta = attention(s, call, l, w.attention, n.y_XD);
    n = k::residual_norm(n.x_XD, delta, w.post_norm_D, s.rms_norm_eps, dtype(), s.layers[l].sparse);
    x = n.x_XD;
    if (!s.layers[l].sparse) {
      const auto& d = w.dense;
      const auto gate_up = k::frozen_linear(n.y_XD, {{d.gate_ID, {}, d.gate_panels}, {d.up_ID, {}, d.up_panels}});
      delta = k::frozen_linear(at::silu(gate_up[0]) * gate_up[1], {{d.down_DI, {}, d.down_panels}})[0];
      continue;
    }
    const MoeResult m = moe(s, call, l, w.router_ED, weights.experts(l, 0, s.num_experts), n.y_XD, n.y_float_XD);
    delta = m.y_TD;
    if (options.aux_loss) {
      ++sparse_layers;
      counts_E = counts_E.defined() ? counts_E + m.counts_E : m.counts_E;
      prob_sum_E = prob_sum_E.defined() ? prob_sum_E + m.prob_sum_E : m.prob_sum_E;
    }
  }
  if (options.cache)
    for (int64_t i = 0; i < batch.num_sequences(); ++i) options.cache->lengths_[i] = call.kv_lengths[i];
  ForwardResult result;
  result.hidden_TD = k::residual_norm(x, delta, weights.final_norm_D(), s.rms_norm_eps, dtype()).y_XD;
  if (options.aux_loss && sparse_layers > 0) {
    // transformers' load_balancing_loss_func: counts and probabilities pooled over the layers; K at uniform routing.
    const double rows = double(sparse_layers) * double(batch.num_tokens());
    result.aux_loss = ((counts_E / rows) * (prob_sum_E / rows)).sum() * double(s.num_experts);
  }
  return result;
}

at::Tensor Decoder::text_logits(const at::Tensor& hidden_XD) const { return k::frozen_linear(hidden_XD, {{base_.weights->head_VD(), {}, base_.weights->head_panels()}})[0]; }

at::Tensor Decoder::modality_logits(const at::Tensor& hidden_XD, int64_t row_set) const {
  return at::linear(hidden_XD, rows_.at(row_set).head_ND.to(hidden_XD.scalar_type()));
}

at::Tensor Decoder::all_logits(const at::Tensor& hidden_XD) const {
  std::vector<at::Tensor> parts{text_logits(hidden_XD).to(at::kFloat)};
  for (size_t i = 0; i < rows_.size(); ++i) parts.push_back(modality_logits(hidden_XD, int64_t(i)).to(at::kFloat));
  return parts.size() == 1 ? parts[0] : at::cat(parts, -1);
}

LossResult cross_entropy_loss(const Decoder& decoder, const at::Tensor& hidden_TD, const at::Tensor& labels_T, double denominator) {
  LossResult result;
  const int64_t V = decoder.spec().vocab_size, sets = int64_t(decoder.rows().size()) + 1;
  std::vector<at::Tensor> rows;
  int64_t total = 0;
  for (int64_t m = 0; m < sets; ++m) {
    const int64_t first = m == 0 ? 0 : decoder.rows()[m - 1].first_id, count = m == 0 ? V : decoder.rows()[m - 1].head_ND.size(0);
    rows.push_back(((labels_T >= first) & (labels_T < first + count)).nonzero().squeeze(1));
    result.count_M.push_back(rows.back().size(0));
    total += rows.back().size(0);
  }
  const double scale = 1.0 / (denominator > 0 ? denominator : double(std::max<int64_t>(total, 1)));
  result.nll_sum_M = at::zeros({sets}, hidden_TD.options().dtype(at::kFloat).requires_grad(false));
  for (int64_t m = 0; m < sets; ++m) {
    if (result.count_M[m] == 0) continue;
    const int64_t first = m == 0 ? 0 : decoder.rows()[m - 1].first_id;
    const at::Tensor head = m == 0 ? decoder.base().weights->head_VD() : decoder.rows()[m - 1].head_ND;
    const at::Tensor part = k::linear_cross_entropy(hidden_TD.index_select(0, rows[m]), head, labels_T.index_select(0, rows[m]) - first, scale, m == 0 ? decoder.base().weights->head_panels() : nullptr);
    result.nll_sum_M[m] = part.detach() / scale;
    result.loss = result.loss.defined() ? result.loss + part : part;
  }
  if (!result.loss.defined()) result.loss = hidden_TD.sum().to(at::kFloat) * 0;  // no label: zero, still part of the graph
  return result;
}

}  // namespace moegraft::model
