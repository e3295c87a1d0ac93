#pragma once
// One decoder layer's parts, as functions of a call.

#include <vector>

#include "moegraft/kernels/ops.h"
#include "moegraft/model/decoder.h"
#include "rope.h"

namespace moegraft::model {

// Keys and values of the tokens before the ones at hand, per layer [S, G, C] each: constants.
struct PastKeys {
  std::vector<at::Tensor> keys, values;
  std::vector<int64_t> cu_seqlens;  // as many sequences as the batch
};

// What every layer of one call shares. Owns what it needs, for a layer may be computed again during the backward pass.
struct Call {
  const DecoderSpec& spec;
  PackedBatch batch;
  std::shared_ptr<const BatchFacts> facts;
  ForwardOptions options;
  std::shared_ptr<TokenDispatcher> dispatcher;
  std::shared_ptr<const AdapterSites> adapters;  // null: none, or the gate is closed
  int64_t num_groups = 1;                        // modalities that experts' rows are sorted by
  at::Tensor modality_T;                         // defined when num_groups > 1
  std::vector<int64_t> kv_lengths;  // with a cache: after this call; empty where the lengths are on the device
  at::Tensor cells_T;               // where they are: the cache's cell of each token, sequences end to end
  std::shared_ptr<const Rotary> rotary;
  RotaryTables rope;
  std::shared_ptr<const PastKeys> past;  // what the sequences begin with; null: nothing
  std::shared_ptr<PastKeys> keep;        // where to leave this call's keys and values
  kernels::DeviceLengths lengths;        // of attention's sequences, on the device: see set_past
  bool apart = false;                    // see stand_apart
};
// num_modalities: of the model, text included.
Call make_call(const DecoderSpec& spec, int64_t num_modalities, const PackedBatch& batch, const ForwardOptions& options,
               std::shared_ptr<TokenDispatcher> dispatcher, std::shared_ptr<const AdapterSites> adapters,
               std::shared_ptr<const Rotary> rotary);

// What the call's sequences begin with (null: nothing), and their lengths on the device: there once for all layers,
// forwards and backwards.
void set_past(Call& call, std::shared_ptr<const PastKeys> past);

// From here on every library call whose bits depend on the number of rows is made once per sequence: with panels
// everywhere, a sequence then has the bits it has alone (rows_stand_alone).
void stand_apart(Call& call);

// x_TD: normed, in the compute dtype.
at::Tensor attention(const Call& call, int64_t layer, const AttentionWeights& w, const at::Tensor& x_TD);

// What adapters do in this layer's MLP. x_TD: its input, normed, in the compute dtype.
MlpTerms mlp_terms(const Call& call, int64_t layer, const at::Tensor& x_TD);
// The MLP's output with the branches'; a token without any keeps its bits.
at::Tensor add_branches(const at::Tensor& y_TD, const MlpTerms& terms);

// A dense layer's gated FFN, in a model without experts with the low-rank terms of sites gate, up and down. x_TD:
// normed, in the compute dtype.
at::Tensor dense_ffn(const Call& call, int64_t layer, const DenseWeights& w, const at::Tensor& x_TD,
                     const MlpTerms& terms);
// What the shared expert adds to the routed ones' output; scale_1D undefined: all of it.
at::Tensor shared_expert(const DenseWeights& w, const at::Tensor& scale_1D, const at::Tensor& x_TD);

struct MoeResult {
  at::Tensor y_TD;
  at::Tensor counts_E, prob_sum_E;  // for the balance loss, when asked for
};
// x_TD: normed, in the experts' dtype; h_TD: the same in float32, for the router.
MoeResult moe(const Call& call, int64_t l, const LayerWeights& layer, const ExpertWeights& w, const at::Tensor& x_TD,
              const at::Tensor& h_TD, const MlpTerms& terms);

}  // namespace moegraft::model
