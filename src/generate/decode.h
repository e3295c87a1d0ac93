#pragma once
// What drawing pictures and writing text share.

#include "moegraft/generate/prompt.h"
#include "moegraft/model/decoder.h"

namespace moegraft::generate {

// A prompt that was run once: its keys and values, and the hidden state of its last token.
struct Prefix {
  model::KvCache cache;
  at::Tensor hidden_1D;
};

// Runs a prompt alone, so that its bits depend on no other prompt.
Prefix prefill(const graft::GraftedModel& model, const PromptTokens& tokens);

// Feeds one token to each of the first ids.size() sequences of the cache. Returns hidden [ids, D].
at::Tensor step(const graft::GraftedModel& model, model::KvCache& cache, const std::vector<int64_t>& ids, int64_t modality);

// UserError when `needed` positions are more than the model has.
void check_positions(const graft::GraftedModel& model, int64_t prompt, int64_t prompt_tokens, int64_t more, const char* what);

// The stream of sample `index` of a prompt: from its tokens, so that it does not depend on which other prompts there are.
uint64_t stream_index(const PromptTokens& tokens, int64_t index);

}  // namespace moegraft::generate
