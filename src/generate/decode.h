#pragma once
// What drawing pictures and writing text share.

#include <optional>

#include "moegraft/generate/prompt.h"
#include "moegraft/generate/sampling.h"
#include "moegraft/model/fixed_step.h"

namespace moegraft::generate {

// A prompt that was run once: its keys and values, and the hidden state of its last token.
struct Prefix {
  model::KvCache cache;
  at::Tensor hidden_1D;
};

// Runs a prompt alone, so that its bits depend on no other prompt.
Prefix prefill(const graft::GraftedModel& model, const PromptTokens& tokens);

// What `automatic` means on a device; the others mean themselves.
DecodeSteps decode_steps(DecodeSteps asked, at::Device device);

// Feeds one token at a time to each of the first `count` sequences of a cache.
class Steps {
 public:
  using Head = model::FixedStep::Head;
  Steps(const graft::GraftedModel& model, model::KvCache& cache, int64_t count, int64_t modality, Head head,
        DecodeSteps how);

  // What head made of the hidden states of ids [count]; valid until the next call.
  at::Tensor operator()(const std::vector<int64_t>& ids);

 private:
  const graft::GraftedModel& model_;
  model::KvCache& cache_;
  const int64_t modality_;
  const Head head_;
  const model::FactorCaches factors_;
  std::optional<model::FixedStep> fixed_;
};

// UserError when `needed` positions are more than the model has.
void check_positions(const graft::GraftedModel& model, int64_t prompt, int64_t prompt_tokens, int64_t more,
                     const char* what);

// The stream of sample `index` of a prompt: from its tokens, so that it does not depend on which other prompts there
// are.
uint64_t stream_index(const PromptTokens& tokens, int64_t index);

}  // namespace moegraft::generate
