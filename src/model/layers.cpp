// Attention and the MoE block. The arithmetic lives in kernels/.
#include "layers.h"

#include "libtorch.h"

#include <algorithm>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/kernels/route.h"

namespace moegraft::model {
namespace {

namespace k = kernels;

// Does a term act on a group? With the gate open there is one group, and everything acts on it.
bool acts(const Call& call, const LowRank& term, int64_t group) {
  if (call.options.gate == Gate::all) return true;
  return std::find(term.modalities.begin(), term.modalities.end(), group) != term.modalities.end();
}

std::vector<LowRank> terms_at(const Call& call, int64_t layer, Site site) {
  return call.adapters ? call.adapters->at(layer, site) : std::vector<LowRank>();
}

struct Projection {
  const std::vector<LowRank>& terms;
  const k::Matrix& weight;
  const at::Tensor& bias;
};

// Linear layers that share their input, each with its low-rank terms.
std::vector<at::Tensor> project(const Call& call, const at::Tensor& x_TX,
                                std::initializer_list<Projection> projections) {
  const auto& tokens_of = call.facts->modality_tokens;
  std::vector<k::AdaptedLinear> layers;
  for (const auto& p : projections) {
    layers.push_back({{p.weight, p.bias}, {}});
    for (const LowRank& term : p.terms) {
      k::LinearLowRank t{term.A, term.B, term.scale, {}, term.weight_T};
      if (call.options.gate == Gate::all) t.groups = {0};
      for (int64_t m = 0; call.options.gate != Gate::all && m < int64_t(tokens_of.size()); ++m)
        if (acts(call, term, m) && tokens_of[size_t(m)].size(0) > 0) t.groups.push_back(m);
      if (!t.groups.empty()) layers.back().terms.push_back(std::move(t));
    }
  }
  return k::adapted_linear(x_TX, layers, call.options.gate == Gate::all ? std::vector<at::Tensor>(1) : tokens_of);
}

std::vector<k::ExpertLowRank> expert_terms(const Call& call, const std::vector<LowRank>& terms,
                                           const TokenDispatcher::Routed& routed) {
  std::vector<k::ExpertLowRank> out;
  for (const LowRank& term : terms) {
    MOEGRAFT_INVARIANT(!term.weight_T.defined() || !routed.plan,
                       "expert parallelism: a low-rank term has a weight for each token, and tokens of other processes "
                       "come here without theirs");
    k::ExpertLowRank e{term.A, term.B, term.scale, {}, term.weight_T};
    bool any = false;
    for (int64_t m = 0; m < call.num_groups; ++m) {
      // In lockstep other processes' tokens come here too.
      const bool on = acts(call, term, m) && (call.options.gate == Gate::all || call.options.lockstep ||
                                              call.facts->modality_tokens[m].size(0) > 0);
      e.acts.push_back(on);
      any |= on;
    }
    if (any) out.push_back(std::move(e));
  }
  return out;
}

// Rows [begin, begin + count) of x_TGC become positions from `past` on of sequence i.
void append(at::Tensor& cache_BSGC, int64_t i, int64_t past, const at::Tensor& x_TGC, int64_t begin, int64_t count) {
  if (!x_TGC.is_cpu() || !x_TGC.is_contiguous() || !cache_BSGC.is_contiguous() ||
      x_TGC.scalar_type() != cache_BSGC.scalar_type()) {
    cache_BSGC[i].narrow(0, past, count).copy_(x_TGC.narrow(0, begin, count));
    return;
  }
  // A decode step does this for every layer: five tensors to copy one row take longer than its attention.
  const int64_t row = x_TGC.size(1) * x_TGC.size(2) * x_TGC.element_size();
  std::memcpy(static_cast<char*>(cache_BSGC.mutable_data_ptr()) + (i * cache_BSGC.size(1) + past) * row,
              static_cast<const char*>(x_TGC.const_data_ptr()) + begin * row, size_t(count * row));
}

at::Tensor frozen_ffn(const DenseWeights& w, const at::Tensor& x_TD) {
  const auto gate_up = k::frozen_linear(x_TD, {{w.gate_ID, w.gate_bias_I}, {w.up_ID, w.up_bias_I}});
  return k::frozen_linear(at::silu(gate_up[0]) * gate_up[1], {{w.down_DI, w.down_bias_D}})[0];
}

// A dense FFN's inputs as those of one expert.
void observe_all_rows(const Call& call, int64_t l, Site site, const at::Tensor& x_TX) {
  std::vector<at::Tensor> rows;
  std::vector<int64_t> offsets{0};
  for (int64_t m = 0; m < call.num_groups; ++m) {
    rows.push_back(call.num_groups == 1 ? x_TX : x_TX.index_select(0, call.facts->modality_tokens[size_t(m)]));
    offsets.push_back(offsets.back() + rows.back().size(0));
  }
  call.options.sites->observe_experts(l, site, at::cat(rows), offsets, call.num_groups);
}

// In float32, like the residual stream: see Decoder::forward.
k::Route choose_experts(const Call& call, int64_t l, const at::Tensor& h_TD, const at::Tensor& router_ED,
                        const at::Tensor& correction_E) {
  const RouterSpec& r = call.spec.router;
  const k::RouteRule rule{
      r.score == RouterSpec::Score::sigmoid, correction_E, r.num_groups, r.topk_groups, r.renormalise, r.scale};
  const auto route = [&](const at::Tensor& logits_TE) {
    return k::route(logits_TE, call.spec.num_experts_per_tok, rule);
  };
  if (!call.apart || call.batch.num_sequences() == 1)
    return route(project(call, h_TD, {{terms_at(call, l, Site::router), k::Matrix(router_ED), {}}})[0]);
  // Where sequences stand apart all is text that nothing trains on, and no term acts.
  std::vector<at::Tensor> probs, ids, weights;
  for (int64_t i = 0; i < call.batch.num_sequences(); ++i) {
    const int64_t begin = call.batch.cu_seqlens[i];
    k::Route r = route(at::linear(h_TD.narrow(0, begin, call.batch.cu_seqlens[i + 1] - begin).clone(),
                                  router_ED));  // memory aligned as it is alone
    probs.push_back(std::move(r.probs_TE)), ids.push_back(std::move(r.topk_ids_TK)),
        weights.push_back(std::move(r.topk_weights_TK));
  }
  return {at::cat(probs), at::cat(ids), at::cat(weights)};
}

}  // namespace

Call make_call(const DecoderSpec& spec, int64_t num_modalities, const PackedBatch& batch, const ForwardOptions& options,
               std::shared_ptr<TokenDispatcher> dispatcher, std::shared_ptr<const AdapterSites> adapters,
               std::shared_ptr<const Rotary> rotary) {
  const int64_t T = batch.num_tokens();
  MOEGRAFT_INVARIANT(batch.positions_T.size(0) == T && !batch.cu_seqlens.empty() && batch.cu_seqlens.back() == T,
                     "PackedBatch does not span its ", T, " tokens");
  Call call{spec,
            batch,
            batch.facts,
            options,
            std::move(dispatcher),
            options.gate == Gate::none ? nullptr : std::move(adapters),
            1,
            {},
            {},
            {},
            std::move(rotary),
            {},
            nullptr,
            nullptr,
            {}};
  if (options.gate == Gate::modality && (batch.modality_T.defined() || options.lockstep)) {
    call.num_groups = options.lockstep ? num_modalities : call.facts->num_modalities;
    if (call.num_groups > 1)
      call.modality_T = batch.modality_T.defined() ? batch.modality_T : at::zeros_like(batch.ids_T);
  }
  int64_t longest = call.facts->longest;
  if (options.lengths_B.defined()) {
    MOEGRAFT_INVARIANT(options.cache && T == batch.num_sequences() && options.lengths_B.size(0) == T &&
                           options.cache->num_sequences() >= T,
                       "a step of one token for each of ", T, " sequences");
    call.cells_T = at::arange(T, options.lengths_B.options()) * options.cache->max_length() + options.lengths_B;
    longest = options.cache->max_length();
  } else if (options.cache) {
    for (int64_t i = 0; i < batch.num_sequences(); ++i) {
      const int64_t length = batch.cu_seqlens[i + 1] - batch.cu_seqlens[i] + options.cache->length(i);
      MOEGRAFT_CHECK(length <= options.cache->max_length(), "sequence ", i, " needs ", length,
                     " positions, the cache holds ", options.cache->max_length());
      call.kv_lengths.push_back(length);
      longest = std::max(longest, length);
    }
  }
  call.rope = call.rotary->tables(batch.positions_T, longest);
  return call;
}

void set_past(Call& call, std::shared_ptr<const PastKeys> past) {
  call.past = std::move(past);
  const at::Tensor& cu = call.facts->cu_seqlens;
  call.lengths = {cu, cu};
  if (call.past)
    call.lengths.cu_kv =
        cu + at::tensor(at::ArrayRef<int64_t>(call.past->cu_seqlens), at::kInt).to(cu.device(), /*non_blocking=*/true);
}

void stand_apart(Call& call) {
  call.apart = true;
  std::vector<at::Tensor> cos, sin;
  for (int64_t i = 0; i < call.batch.num_sequences(); ++i) {
    const int64_t begin = call.batch.cu_seqlens[i], count = call.batch.cu_seqlens[i + 1] - begin;
    const RotaryTables rope = call.rotary->tables(call.batch.positions_T.narrow(0, begin, count).clone(), count);
    cos.push_back(rope.cos_TC);
    sin.push_back(rope.sin_TC);
  }
  call.rope = {at::cat(cos), at::cat(sin)};
}

at::Tensor attention(const Call& call, int64_t l, const AttentionWeights& w, const at::Tensor& x_TD) {
  const DecoderSpec& spec = call.spec;
  const int64_t T = x_TD.size(0), H = spec.num_heads, G = spec.num_kv_heads, C = spec.head_dim;
  const auto qkv = project(call, x_TD,
                           {{terms_at(call, l, Site::q), w.q, w.q_bias},
                            {terms_at(call, l, Site::k), w.k, w.k_bias},
                            {terms_at(call, l, Site::v), w.v, w.v_bias}});
  const auto heads = k::norm_rotary({{qkv[0], H, w.q_norm}, {qkv[1], G, w.k_norm}}, call.rope.cos_TC, call.rope.sin_TC,
                                    spec.rms_norm_eps, spec.clip_qkv);
  const at::Tensor &q = heads[0], &key = heads[1],
                   v = (spec.clip_qkv > 0 ? qkv[2].clamp(-spec.clip_qkv, spec.clip_qkv) : qkv[2]).view({T, G, C});
  const double scale = 1.0 / std::sqrt(double(C));
  const int64_t window = spec.layers[l].sliding_window;
  at::Tensor out;
  if (KvCache* cache = call.options.cache; cache && call.cells_T.defined()) {
    cache->keys[l].view({-1, G, C}).index_copy_(0, call.cells_T, key);
    cache->values[l].view({-1, G, C}).index_copy_(0, call.cells_T, v);
    out = k::step_attention(q, cache->keys[l], cache->values[l], call.options.lengths_B, window, scale);
  } else if (cache) {
    for (int64_t i = 0; i < call.batch.num_sequences(); ++i) {
      const int64_t begin = call.batch.cu_seqlens[i], count = call.batch.cu_seqlens[i + 1] - begin,
                    past = call.kv_lengths[i] - count;
      append(cache->keys[l], i, past, key, begin, count);
      append(cache->values[l], i, past, v, begin, count);
    }
    out =
        k::cached_attention(q, cache->keys[l], cache->values[l], call.batch.cu_seqlens, call.kv_lengths, window, scale);
  } else if (call.past) {
    const std::vector<int64_t>&before = call.past->cu_seqlens, &cu = call.batch.cu_seqlens;
    std::vector<int64_t> cu_kv;
    for (size_t i = 0; i < cu.size(); ++i) cu_kv.push_back(before[i] + cu[i]);
    out = k::packed_attention(q, k::join_sequences(call.past->keys[l], key, before, cu),
                              k::join_sequences(call.past->values[l], v, before, cu), cu, cu_kv, window, scale,
                              call.lengths);
  } else {
    out = k::packed_attention(q, key, v, call.batch.cu_seqlens, call.batch.cu_seqlens, window, scale, call.lengths);
  }
  if (call.keep) {
    call.keep->keys.push_back(key);
    call.keep->values.push_back(v);
  }
  return project(call, out.reshape({T, H * C}), {{terms_at(call, l, Site::o), w.o, w.o_bias}})[0];
}

MlpTerms mlp_terms(const Call& call, int64_t layer, const at::Tensor& x_TD) {
  return call.adapters
             ? call.adapters->mlp({layer, x_TD, call.batch, call.options.gate == Gate::all, call.options.adapter_loss})
             : MlpTerms();
}

at::Tensor add_branches(const at::Tensor& y_TD, const MlpTerms& terms) {
  at::Tensor sum_TD = y_TD;
  for (const MlpTerms::Branch& branch : terms.branches)
    if (branch.tokens_X.size(0) > 0) sum_TD = sum_TD.index_add(0, branch.tokens_X, branch.y_XD.to(y_TD.scalar_type()));
  return sum_TD;
}

at::Tensor dense_ffn(const Call& call, int64_t l, const DenseWeights& w, const at::Tensor& x_TD,
                     const MlpTerms& terms) {
  if (call.spec.has_experts()) return frozen_ffn(w, x_TD);  // where the sites are the experts'
  const auto gate_up = project(call, x_TD, {{terms.gate, w.gate_ID, w.gate_bias_I}, {terms.up, w.up_ID, w.up_bias_I}});
  const at::Tensor hidden_TI = at::silu(gate_up[0]) * gate_up[1];
  if (call.options.sites) {
    observe_all_rows(call, l, Site::gate, x_TD);
    observe_all_rows(call, l, Site::down, hidden_TI);
  }
  return project(call, hidden_TI, {{terms.down, w.down_DI, w.down_bias_D}})[0];
}

at::Tensor shared_expert(const DenseWeights& w, const at::Tensor& scale_1D, const at::Tensor& x_TD) {
  const at::Tensor y_TD = frozen_ffn(w, x_TD);
  return scale_1D.defined() ? at::sigmoid(at::linear(x_TD, scale_1D)) * y_TD : y_TD;
}

MoeResult moe(const Call& call, int64_t l, const LayerWeights& layer, const ExpertWeights& w, const at::Tensor& x_TD,
              const at::Tensor& h_TD, const MlpTerms& terms) {
  const DecoderSpec& spec = call.spec;
  const k::Route r = choose_experts(call, l, h_TD, layer.router_ED.to(at::kFloat), layer.router_correction_E);
  if (call.options.routing) {
    at::NoGradGuard no_grad;
    call.options.routing->observe(l, r.probs_TE.detach(), r.topk_ids_TK, r.topk_weights_TK.detach(),
                                  call.batch.modality_T);
  }
  const TokenDispatcher::Routed routed = call.dispatcher->dispatch(x_TD, r.topk_ids_TK, r.topk_weights_TK,
                                                                   spec.num_experts, call.modality_T, call.num_groups);
  const k::ExpertFfnWeights weights = w.as_ffn();
  const k::ExpertFfnAdapters adapters{expert_terms(call, terms.gate, routed), expert_terms(call, terms.up, routed),
                                      expert_terms(call, terms.down, routed),
                                      call.options.factors ? call.options.factors->at(size_t(l)) : nullptr};
  at::Tensor hidden_RF;
  const at::Tensor out_XD = k::moe_ffn(routed.x_XD, routed.weights_XK, routed.dispatch, weights, adapters,
                                       call.options.sites ? &hidden_RF : nullptr);
  if (SiteObserver* sites = call.options.sites) {
    const auto offsets = routed.dispatch.host_offsets();
    sites->observe_experts(l, Site::gate, k::permute(routed.x_XD, routed.dispatch), offsets, call.num_groups);
    sites->observe_experts(l, Site::down, hidden_RF, offsets, call.num_groups);
  }
  MoeResult out{call.dispatcher->combine(out_XD, routed), {}, {}};
  if (call.options.aux_loss) {
    out.counts_E = at::bincount(r.topk_ids_TK.reshape({-1}), {}, spec.num_experts).to(at::kFloat);
    out.prob_sum_E = r.probs_TE.sum(0);
  }
  return out;
}

}  // namespace moegraft::model
