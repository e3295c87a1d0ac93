#pragma once
// The decoder, written once for every family against DecoderSpec.

#include <torch/types.h>

#include <functional>
#include <memory>
#include <vector>

#include "moegraft/model/batch.h"
#include "moegraft/model/dispatcher.h"
#include "moegraft/model/prefix_cache.h"
#include "moegraft/model/sites.h"
#include "moegraft/model/spec.h"
#include "moegraft/model/weights.h"

namespace moegraft::model {

// Which rows adapters act on: their modality's (default), every row (parity with a plain PEFT adapter), or none (the
// base).
enum class Gate { modality, all, none };

// Told of every routing decision; accumulate on the device, do not synchronise.
class RoutingObserver {
 public:
  virtual ~RoutingObserver() = default;
  // probs_TE: router probabilities before top-k (float32). topk_ids_TK int64, topk_weights_TK as used. modality_T may
  // be undefined (all text).
  virtual void observe(int64_t layer, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK,
                       const at::Tensor& topk_weights_TK, const at::Tensor& modality_T) = 0;
};

// Sees inputs of adapter sites (calibration): rows x with their modality; expert sites also get expert ids.
class SiteObserver {
 public:
  virtual ~SiteObserver() = default;
  // rows_RD sorted by (expert, modality): offsets has E*M+1 entries for M modalities. site gate stands for gate and up
  // (same input). A dense model's FFN is one expert.
  virtual void observe_experts(int64_t layer, Site site, const at::Tensor& rows_RX, const std::vector<int64_t>& offsets,
                               int64_t num_modalities) = 0;
};

// Keys and values per sequence. Sequences may differ in length.
class KvCache {
 public:
  // Room for num_sequences sequences of up to max_length tokens.
  KvCache(const DecoderSpec& spec, int64_t num_sequences, int64_t max_length, at::ScalarType dtype, at::Device device);
  int64_t length(int64_t sequence) const { return lengths_[sequence]; }
  int64_t num_sequences() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t max_length() const { return max_length_; }
  void truncate(int64_t sequence, int64_t length) { lengths_[sequence] = length; }
  // Copies sequence `source` of another cache into `target` here (prefix reuse).
  void copy_sequence(int64_t target, const KvCache& other, int64_t source);

  std::vector<at::Tensor> keys, values;  // per layer [B, max_length, G, C]
 private:
  friend class Decoder;
  friend class FixedStep;
  std::vector<int64_t> lengths_;
  int64_t max_length_;
};

using FactorCaches = std::vector<std::shared_ptr<kernels::FactorCache>>;
FactorCaches make_factor_caches(const DecoderSpec& spec);

struct ForwardOptions {
  Gate gate = Gate::modality;
  KvCache* cache = nullptr;  // batch sequence i appends to cache sequence i; attends to all of it
  // One token for each of the cache's first sequences, whose lengths before this call are read on the device (int64
  // [B]) instead of being the host's: what is launched is then the same for all lengths, and the cache's own are left
  // to the caller (FixedStep).
  at::Tensor lengths_B;
  const FactorCaches* factors =
      nullptr;  // [num_layers]: adapters' factors laid out once for calls between which none of them changes
  RoutingObserver* routing = nullptr;
  SiteObserver* sites = nullptr;
  bool aux_loss = false;      // fill aux_loss (differentiable)
  bool adapter_loss = false;  // fill adapter_loss (differentiable)
  // Where gradients are recorded: text before a sequence's first token of another modality is run without (it meets
  // nothing trainable). Switched off by itself when the base or an adapter trains on text.
  bool frozen_prefix = true;
  // Where a frozen prefix is run: what is known of captions, and room for more. Not used in lockstep (what is known
  // must not decide who joins a collective), with weights that visit, or with rotary tables that depend on the batch's
  // longest sequence. Null: none.
  PrefixCache* prefix_cache = nullptr;
  int64_t recompute_layers =
      0;  // the first n layers keep only their input and run again in the backward pass (not with aux_loss)
  // Several processes make this pass together, for experts or weights are spread over them: whatever its tokens are,
  // each records gradients through every layer and sorts by as many modalities as there are, so that all issue the same
  // collectives, forwards and backwards.
  bool lockstep = false;
};

struct ForwardResult {
  at::Tensor hidden_TD;  // after the final norm, compute dtype
  at::Tensor aux_loss;   // load balancing loss as transformers' load_balancing_loss_func (undefined unless asked for)
  at::Tensor adapter_loss;  // sum of the adapters' own losses, with their coefficients; undefined where not asked for,
                            // or where none met a token of its modalities
  // When a frozen prefix was run apart: its tokens and the others, each a batch with its hidden states. Undefined
  // otherwise.
  at::Tensor prefix_hidden_TD, rest_hidden_TD;
  PackedBatch prefix, rest;
};
struct PastKeys;
class Rotary;

class Decoder {
 public:
  explicit Decoder(BaseModel base);

  void attach(std::shared_ptr<const AdapterSites> adapters);  // null detaches
  void attach_rows(ModalityRows rows);  // appended in order; first_id must continue the vocabulary
  void detach_all();
  void set_dispatcher(std::shared_ptr<TokenDispatcher> dispatcher) { dispatcher_ = std::move(dispatcher); }
  const TokenDispatcher& dispatcher() const { return *dispatcher_; }

  const DecoderSpec& spec() const { return base_.spec; }
  const BaseModel& base() const { return base_; }
  BaseModel& base() { return base_; }
  const std::vector<ModalityRows>& rows() const { return rows_; }
  int64_t total_vocab() const;                                          // V + all new rows
  std::vector<int64_t> id_bounds() const;                               // as BatchFacts::id_bounds
  int64_t num_modalities() const { return int64_t(rows_.size()) + 1; }  // text first
  at::ScalarType dtype() const { return base_.weights->dtype(); }
  at::Device device() const { return base_.weights->device(); }

  ForwardResult forward(const PackedBatch& batch, const ForwardOptions& options = {}) const;

  // Logits in the compute dtype. The text product never depends on attached rows (C1).
  at::Tensor text_logits(const at::Tensor& hidden_XD) const;                       // [X, V]
  at::Tensor modality_logits(const at::Tensor& hidden_XD, int64_t row_set) const;  // [X, N] of rows()[row_set]
  at::Tensor all_logits(const at::Tensor& hidden_XD) const;                        // [X, V + new rows], float32

 private:
  bool may_freeze_prefix(const ForwardOptions& options) const;
  bool may_cache_prefix(const ForwardOptions& options) const;
  ForwardResult run(const PackedBatch& batch, const ForwardOptions& options, std::shared_ptr<const PastKeys> past,
                    std::shared_ptr<PastKeys> keep) const;

  bool text_is_frozen_ = true;
  BaseModel base_;
  std::shared_ptr<const AdapterSites> adapters_;
  std::vector<ModalityRows> rows_;
  std::shared_ptr<TokenDispatcher> dispatcher_;
  std::shared_ptr<const Rotary> rotary_;
};

// Summed cross-entropy over labelled positions, divided by `denominator`. Labels are normalised over their own
// modality's rows (SYSTEMS §1): text labels over 0..V-1, image labels over that modality's rows. Chunked over rows;
// logits only where a label is.
struct LossResult {
  at::Tensor loss;       // scalar float32, differentiable
  at::Tensor nll_sum_M;  // float32 [num modalities + 1], detached: text first
  std::vector<int64_t> count_M;
};
LossResult cross_entropy_loss(const Decoder& decoder, const ForwardResult& forward, const PackedBatch& batch,
                              double denominator = 0 /* 0: number of labels */);

}  // namespace moegraft::model
