// The FLOPs that a training step needs: 2 per active parameter and token forward, the same for the gradient of the
// activations, and LoRA's own.
#include "moegraft/planning/work.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/adapters/sites.h"

namespace moegraft::planning {

namespace {

// Weights that a token meets in all layers; the embedding is a look-up, the head is counted with the labels.
double active_layer_parameters(const model::DecoderSpec& s) {
  const double D = double(s.hidden_size), q = double(s.num_heads * s.head_dim),
               kv = double(s.num_kv_heads * s.head_dim);
  double total = 0;
  for (const auto& layer : s.layers) {
    total += D * (q + 2 * kv) + q * D;
    total += layer.sparse
                 ? double(s.num_experts) * D + (double(s.num_experts_per_tok) * double(s.moe_intermediate_size) +
                                                double(s.shared_expert.intermediate_size)) *
                                                   3 * D
                 : 3 * D * double(s.intermediate_size);
  }
  return total;
}

// Multiply-adds of the two thin products of every site that a row passes.
double lora_parameters_per_token(const model::DecoderSpec& s, int64_t rank, const std::vector<model::Site>& sites) {
  double total = 0;
  for (int64_t l = 0; l < s.num_layers; ++l)
    for (const model::Site site : sites) {
      if (!adapters::has_site(s, l, site)) continue;
      const auto shape = adapters::site_shape(s, site);
      total += double(rank) * double(shape.in + shape.out) *
               (adapters::is_per_expert(s, site) ? double(s.num_experts_per_tok) : 1.0);
    }
  return total;
}

// Weights that `tokens` tokens meet between them.
double weights_met(const model::DecoderSpec& s, int64_t tokens) {
  model::DecoderSpec met = s;
  met.num_experts_per_tok = std::min(s.num_experts, tokens * s.num_experts_per_tok);
  return active_layer_parameters(met) + double(s.hidden_size) * double(s.vocab_size);
}

}  // namespace

StepWork count_work(const graft::GraftedModel& m, const model::PackedBatch& batch, model::Gate gate, int64_t rank,
                    const std::vector<model::Site>& sites, int64_t passes) {
  const model::DecoderSpec& s = m.decoder->spec();
  const int64_t T = batch.num_tokens();
  const at::Tensor labels = batch.labels_T.to(at::kCPU).contiguous(),
                   modality = batch.modality_T.defined() ? batch.modality_T.to(at::kCPU).contiguous()
                                                         : at::zeros({T}, at::kLong);
  const int64_t *label = labels.const_data_ptr<int64_t>(), *mod = modality.const_data_ptr<int64_t>();
  const double layers = active_layer_parameters(s), lora = lora_parameters_per_token(s, rank, sites),
               D = double(s.hidden_size);
  StepWork work;
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], end = batch.cu_seqlens[i + 1];
    bool needs_gradient = gate == model::Gate::all;
    for (int64_t t = begin; t < end; ++t) {
      needs_gradient |= mod[t] != 0;  // nothing trainable touched the text before the first image token
      double parameters = layers;
      // Everything labelled: the last token of a sequence, which has no successor, counts as if it had one.
      const bool last = t + 1 == end && t > begin && label[begin] != model::kNoLabel;
      if (label[t] != model::kNoLabel || last) {
        const bool text = label[last ? t - 1 : t] < s.vocab_size;
        parameters += D * double(text ? s.vocab_size : m.vocabulary.modalities.front().num_codes + 2);
      }
      work.forward += 2 * parameters;
      if (needs_gradient) work.activation_gradient += 2 * parameters;
      const bool adapted = gate == model::Gate::all || (gate == model::Gate::modality && mod[t] != 0);
      if (rank > 0 && adapted) work.lora += 3 * 2 * lora;  // forward, activation gradient, weight gradient
      work.attention_scores += (needs_gradient ? 3 : 1) * 4 * double(s.num_heads * s.head_dim) * double(t - begin + 1) *
                               double(s.num_layers);
    }
  }
  const kernels::Matrix head = m.decoder->base().weights->head_VD();  // all matrices have its format
  work.memory_bytes = 2 * double(head.bytes()) / double(head.rows() * head.columns()) * weights_met(s, T);
  for (double* part :
       {&work.forward, &work.activation_gradient, &work.lora, &work.attention_scores, &work.memory_bytes})
    *part *= double(passes);
  for (const auto& p : m.registry->all()) work.memory_bytes += 10.0 * double(p.tensor.nbytes());
  return work;
}

}  // namespace moegraft::planning
