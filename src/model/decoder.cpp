// The forward pass. Control flow stays visible here; the arithmetic lives in kernels/.
#include "moegraft/model/decoder.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "layers.h"
#include "moegraft/kernels/ops.h"
#include "prefix.h"
#include "recompute.h"

namespace moegraft::model {

namespace k = kernels;

PackedBatch pack_rows(const at::Tensor& ids_BS) {
  MOEGRAFT_CHECK(ids_BS.dim() == 2 && ids_BS.scalar_type() == at::kLong, "input_ids must be int64 [B,S], got ",
                 c10::toString(ids_BS.scalar_type()), " ", ids_BS.sizes().vec());
  const int64_t B = ids_BS.size(0), S = ids_BS.size(1);
  PackedBatch batch;
  batch.ids_T = ids_BS.reshape({-1}).contiguous();
  batch.positions_T = at::arange(S, at::TensorOptions(at::kLong).device(ids_BS.device())).repeat({B});
  for (int64_t b = 0; b <= B; ++b) batch.cu_seqlens.push_back(b * S);
  return batch;
}

KvCache::KvCache(const DecoderSpec& spec, int64_t num_sequences, int64_t max_length, at::ScalarType dtype,
                 at::Device device)
    : lengths_(num_sequences, 0), max_length_(max_length) {
  const auto options = at::TensorOptions(dtype).device(device);
  for (int64_t l = 0; l < spec.num_layers; ++l) {
    keys.push_back(at::empty({num_sequences, max_length, spec.num_kv_heads, spec.head_dim}, options));
    values.push_back(at::empty({num_sequences, max_length, spec.num_kv_heads, spec.head_dim}, options));
  }
}

void KvCache::copy_sequence(int64_t target, const KvCache& other, int64_t source) {
  const int64_t length = other.lengths_.at(source);
  MOEGRAFT_INVARIANT(length <= max_length_, "KvCache::copy_sequence: ", length, " positions into room for ",
                     max_length_);
  for (size_t l = 0; l < keys.size(); ++l) {
    keys[l][target].narrow(0, 0, length).copy_(other.keys[l][source].narrow(0, 0, length));
    values[l][target].narrow(0, 0, length).copy_(other.values[l][source].narrow(0, 0, length));
  }
  lengths_.at(target) = length;
}

FactorCaches make_factor_caches(const DecoderSpec& spec) {
  FactorCaches caches;
  for (int64_t l = 0; l < spec.num_layers; ++l) caches.push_back(k::make_factor_cache());
  return caches;
}

Decoder::Decoder(BaseModel base) : base_(std::move(base)), dispatcher_(std::make_shared<LocalDispatcher>()) {
  MOEGRAFT_INVARIANT(base_.weights != nullptr, "Decoder needs weights");
  rotary_ = std::make_shared<Rotary>(base_.spec, device());
}

void Decoder::attach(std::shared_ptr<const AdapterSites> adapters) {
  adapters_ = std::move(adapters);
  text_is_frozen_ = !adapters_ || !adapters_->mlp_takes_text();
  if (!adapters_) return;
  for (int64_t l = 0; l < spec().num_layers; ++l)
    for (const Site site : kAllSites)
      for (const LowRank& term : adapters_->at(l, site))
        text_is_frozen_ &= std::find(term.modalities.begin(), term.modalities.end(), 0) == term.modalities.end();
}

void Decoder::attach_rows(ModalityRows rows) {
  MOEGRAFT_INVARIANT(rows.first_id == total_vocab(), "new rows must continue the vocabulary at ", total_vocab(),
                     ", got ", rows.first_id);
  MOEGRAFT_INVARIANT(
      rows.embedding_ND.size(1) == spec().hidden_size && rows.head_ND.sizes() == rows.embedding_ND.sizes(), "new rows ",
      rows.embedding_ND.sizes(), ", ", rows.head_ND.sizes());
  rows_.push_back(std::move(rows));
}

void Decoder::detach_all() {
  attach(nullptr);
  rows_.clear();
}

int64_t Decoder::total_vocab() const {
  int64_t total = spec().vocab_size;
  for (const auto& rows : rows_) total += rows.embedding_ND.size(0);
  return total;
}

std::vector<int64_t> Decoder::id_bounds() const {
  std::vector<int64_t> bounds{0, spec().vocab_size};
  for (const auto& rows : rows_) bounds.push_back(rows.first_id + rows.embedding_ND.size(0));
  return bounds;
}

namespace {

at::Tensor embed(const Decoder& decoder, WeightProvider& weights, const PackedBatch& batch) {
  const auto& tokens = batch.facts->id_tokens;
  if (tokens[0].size(0) == batch.num_tokens())
    return k::embedding(weights.embedding_VD(), batch.ids_T, weights.dtype());
  at::Tensor x = k::embedding(weights.embedding_VD(),
                              batch.ids_T.masked_fill(batch.ids_T >= decoder.spec().vocab_size, 0), weights.dtype());
  for (size_t i = 0; i < decoder.rows().size(); ++i) {
    if (tokens[i + 1].size(0) == 0) continue;
    const auto& rows = decoder.rows()[i];
    const at::Tensor picked =
        at::embedding(rows.embedding_ND, batch.ids_T.index_select(0, tokens[i + 1]) - rows.first_id);
    x = x.index_copy(0, tokens[i + 1], picked.to(x.scalar_type()));
  }
  return x;
}

// The residual stream, float32, and what is not yet added to it: the next norm adds and rounds in one pass. It and the
// router stay in float32 under a bf16 base: rounding them is what flips near-tied experts, and one flip moves a
// position's logits more than all other bf16 rounding together.
struct Stream {
  at::Tensor x_TD, delta_TD;
};
struct Balance {
  at::Tensor counts_E, prob_sum_E;
  int64_t layers = 0;
};

// losses: where the parts of adapters' losses go.
Stream run_layer(const Call& call, WeightProvider& weights, int64_t l, const Stream& in, Balance* balance,
                 std::vector<MlpTerms::LossPart>& losses) {
  const DecoderSpec& s = call.spec;
  const auto dtype = weights.dtype();
  const LayerWeights w = weights.layer(l);
  k::ResidualNorm n = k::residual_norm(in.x_TD, in.delta_TD, w.input_norm_D, s.rms_norm_eps, dtype);
  const at::Tensor attended = attention(call, l, w.attention, n.y_XD);
  n = k::residual_norm(n.x_XD, attended, w.post_norm_D, s.rms_norm_eps, dtype, s.layers[l].sparse);
  const MlpTerms terms = mlp_terms(call, l, n.y_XD);
  losses.insert(losses.end(), terms.losses.begin(), terms.losses.end());
  if (!s.layers[l].sparse) return {n.x_XD, add_branches(dense_ffn(call, l, w.dense, n.y_XD, terms), terms)};
  const auto [first, count] = call.dispatcher->local_experts(s.num_experts);
  const MoeResult m = moe(call, l, w, weights.experts(l, first, count), n.y_XD, n.y_float_XD, terms);
  if (balance) {
    ++balance->layers;
    balance->counts_E = balance->counts_E.defined() ? balance->counts_E + m.counts_E : m.counts_E;
    balance->prob_sum_E = balance->prob_sum_E.defined() ? balance->prob_sum_E + m.prob_sum_E : m.prob_sum_E;
  }
  return {n.x_XD,
          add_branches(w.dense.gate_ID.defined() ? m.y_TD + shared_expert(w.dense, w.shared_scale_1D, n.y_XD) : m.y_TD,
                       terms)};
}

// Undefined without parts.
at::Tensor sum_losses(const std::vector<MlpTerms::LossPart>& losses) {
  std::vector<std::pair<const AdapterSites*, std::vector<at::Tensor>>> parts_of;
  for (const auto& [of, part] : losses) {
    auto found = std::find_if(parts_of.begin(), parts_of.end(), [of = of](const auto& row) { return row.first == of; });
    if (found == parts_of.end()) found = parts_of.insert(found, {of, {}});
    found->second.push_back(part);
  }
  at::Tensor sum;
  for (const auto& [of, parts] : parts_of) sum = sum.defined() ? sum + of->loss(parts) : of->loss(parts);
  return sum;
}

}  // namespace

ForwardResult Decoder::forward(const PackedBatch& batch_in, const ForwardOptions& options) const {
  PackedBatch batch = batch_in;
  if (!batch.facts) batch.facts = std::make_shared<BatchFacts>(describe_batch(batch, id_bounds()));
  bool in_two_passes = may_freeze_prefix(options) && prefix_is_worth_it(*batch.facts, batch.num_tokens());
  if (options.lockstep && at::GradMode::is_enabled())
    in_two_passes = dispatcher_->agree(in_two_passes && batch.facts->num_modalities > 1);  // everybody, or nobody
  if (!in_two_passes) return run(batch, options, nullptr, nullptr);

  // Text before a sequence's first token of another modality meets nothing that trains: its pass keeps nothing but keys
  // and values.
  const std::shared_ptr<const SplitBatch> cut =
      batch.facts->split ? batch.facts->split : std::make_shared<SplitBatch>(split_prefix(batch));
  const SplitBatch& split = *cut;
  const auto run_prefix = [this](const PackedBatch& part, const ForwardOptions& with, std::shared_ptr<PastKeys> keep) {
    return run(part, with, nullptr, std::move(keep)).hidden_TD;
  };
  std::shared_ptr<const PastKeys> past;
  ForwardResult result;
  {
    at::NoGradGuard no_grad;
    if (may_cache_prefix(options)) {
      PrefixPass pass = cached_prefix(*options.prefix_cache, spec(), *base_.weights, split, options, run_prefix);
      result.prefix_hidden_TD = std::move(pass.hidden_TD);
      past = std::move(pass.past);
    } else {
      auto keep = std::make_shared<PastKeys>();
      keep->cu_seqlens = split.prefix.cu_seqlens;
      result.prefix_hidden_TD = run_prefix(split.prefix, options, keep);
      past = std::move(keep);
    }
  }
  if (split.rest.num_tokens() == 0) {
    result.hidden_TD = result.prefix_hidden_TD;
    result.prefix_hidden_TD = at::Tensor();
    return result;
  }
  ForwardResult rest = run(split.rest, options, past, nullptr);
  result.rest_hidden_TD = std::move(rest.hidden_TD);
  result.adapter_loss = std::move(rest.adapter_loss);
  result.hidden_TD =
      at::empty({batch.num_tokens(), spec().hidden_size}, result.rest_hidden_TD.options().requires_grad(false))
          .index_copy(0, split.prefix_tokens, result.prefix_hidden_TD)
          .index_copy(0, split.rest_tokens, result.rest_hidden_TD);
  result.prefix = split.prefix;
  result.rest = split.rest;
  return result;
}

bool Decoder::may_freeze_prefix(const ForwardOptions& options) const {
  return options.frozen_prefix && at::GradMode::is_enabled() && text_is_frozen_ && options.gate != Gate::all &&
         !base_.weights->trainable() && !options.cache && !options.sites && !options.aux_loss;
}

bool Decoder::may_cache_prefix(const ForwardOptions& options) const {
  return options.prefix_cache && !options.lockstep && !base_.weights->transient() && spec().rope.type != "dynamic";
}

ForwardResult Decoder::run(const PackedBatch& batch, const ForwardOptions& options,
                           std::shared_ptr<const PastKeys> past, std::shared_ptr<PastKeys> keep) const {
  const DecoderSpec& s = spec();
  const std::shared_ptr<WeightProvider> weights = base_.weights;
  auto call = std::make_shared<Call>(make_call(s, num_modalities(), batch, options, dispatcher_, adapters_, rotary_));
  set_past(*call, std::move(past));
  call->keep = std::move(keep);
  if (options.prefix_cache && call->keep) stand_apart(*call);
  Stream stream{embed(*this, *weights, batch).to(at::kFloat), {}};
  Balance balance;
  std::vector<MlpTerms::LossPart> losses;
  const bool recorded = at::GradMode::is_enabled();
  if (options.lockstep && recorded && !stream.x_TD.requires_grad()) stream.x_TD.requires_grad_();
  const int64_t recomputed = !recorded || options.aux_loss || options.cache ? 0
                             : weights->transient()                         ? s.num_layers
                                                                            : options.recompute_layers;
  for (int64_t l = 0; l < s.num_layers; ++l) {
    if (l + 1 < s.num_layers || !recorded)
      weights->prefetch((l + 1) % s.num_layers);  // a backward pass begins where the forward pass ends
    if (l < recomputed) {
      auto again = std::make_shared<Call>(*call);
      again->options.routing = nullptr;                                          // told once
      const auto owners = std::make_shared<std::vector<const AdapterSites*>>();  // of the results after the stream
      const auto layer = [weights, l, owners](const std::shared_ptr<Call>& with, bool backwards = false) {
        return [weights, l, owners, with, backwards](const at::Tensor& x) {
          if (backwards) weights->prefetch(l - 1);
          std::vector<MlpTerms::LossPart> parts;
          const Stream out = run_layer(*with, *weights, l, {x, {}}, nullptr, parts);
          std::vector<at::Tensor> results{
              out.x_TD + out.delta_TD};  // one tensor to keep; the sum that the next norm would make, to the bit
          owners->clear();
          for (auto& [of, part] : parts) owners->push_back(of), results.push_back(std::move(part));
          return results;
        };
      };
      const std::vector<at::Tensor> results = recompute(layer(call), layer(again, true), stream.x_TD);
      stream.x_TD = results[0];
      for (size_t i = 0; i < owners->size(); ++i) losses.push_back({(*owners)[i], results[i + 1]});
    } else {
      stream = run_layer(*call, *weights, l, stream, options.aux_loss ? &balance : nullptr, losses);
    }
  }
  if (options.cache && !options.lengths_B.defined())
    for (int64_t i = 0; i < batch.num_sequences(); ++i) options.cache->lengths_[i] = call->kv_lengths[i];
  ForwardResult result;
  result.hidden_TD =
      k::residual_norm(stream.x_TD, stream.delta_TD, weights->final_norm_D(), s.rms_norm_eps, dtype()).y_XD;
  if (options.aux_loss && balance.layers > 0) {
    // transformers' load_balancing_loss_func: counts and probabilities pooled over the layers; K at uniform routing.
    const double rows = double(balance.layers) * double(batch.num_tokens());
    result.aux_loss = ((balance.counts_E / rows) * (balance.prob_sum_E / rows)).sum() * double(s.num_experts);
  }
  result.adapter_loss = sum_losses(losses);
  return result;
}

at::Tensor Decoder::text_logits(const at::Tensor& hidden_XD) const {
  return k::frozen_linear(hidden_XD, {{base_.weights->head_VD(), {}}})[0];
}

at::Tensor Decoder::modality_logits(const at::Tensor& hidden_XD, int64_t row_set) const {
  return at::linear(hidden_XD, rows_.at(row_set).head_ND.to(hidden_XD.scalar_type()));
}

at::Tensor Decoder::all_logits(const at::Tensor& hidden_XD) const {
  std::vector<at::Tensor> parts{text_logits(hidden_XD).to(at::kFloat)};
  for (size_t i = 0; i < rows_.size(); ++i) parts.push_back(modality_logits(hidden_XD, int64_t(i)).to(at::kFloat));
  return parts.size() == 1 ? parts[0] : at::cat(parts, -1);
}

namespace {

// Adds the loss of the labels of `batch`, whose hidden states are hidden_TD.
void add_loss(const Decoder& decoder, const at::Tensor& hidden_TD, const PackedBatch& batch, double scale,
              LossResult& result) {
  for (size_t m = 0; m < batch.facts->label_tokens.size(); ++m) {
    const at::Tensor& tokens = batch.facts->label_tokens[m];
    if (tokens.size(0) == 0) continue;
    const int64_t first = batch.facts->id_bounds[m];
    WeightProvider& weights = *decoder.base().weights;
    const k::Matrix head = m == 0 ? weights.head_VD() : k::Matrix(decoder.rows()[m - 1].head_ND);
    const at::Tensor part = k::linear_cross_entropy(hidden_TD.index_select(0, tokens), head,
                                                    batch.labels_T.index_select(0, tokens) - first, scale);
    result.nll_sum_M[int64_t(m)].add_(part.detach() / scale);
    result.count_M[m] += tokens.size(0);
    result.loss = result.loss.defined() ? result.loss + part : part;
  }
}

}  // namespace

LossResult cross_entropy_loss(const Decoder& decoder, const ForwardResult& forward, const PackedBatch& batch_in,
                              double denominator) {
  PackedBatch batch = batch_in;
  if (!batch.facts) batch.facts = std::make_shared<BatchFacts>(describe_batch(batch, decoder.id_bounds()));
  LossResult result;
  result.count_M.assign(decoder.rows().size() + 1, 0);
  const double scale = 1.0 / (denominator > 0 ? denominator : double(std::max<int64_t>(batch.facts->num_labels, 1)));
  result.nll_sum_M =
      at::zeros({int64_t(result.count_M.size())}, forward.hidden_TD.options().dtype(at::kFloat).requires_grad(false));
  if (forward.rest_hidden_TD.defined()) {  // the two parts by themselves: the prefix's hidden states need no gradient
    add_loss(decoder, forward.prefix_hidden_TD, forward.prefix, scale, result);
    add_loss(decoder, forward.rest_hidden_TD, forward.rest, scale, result);
  } else {
    add_loss(decoder, forward.hidden_TD, batch, scale, result);
  }
  if (!result.loss.defined())
    result.loss = forward.hidden_TD.sum().to(at::kFloat) * 0;  // no label: zero, still part of the graph
  return result;
}

}  // namespace moegraft::model
