#pragma once
// Continues prompts with text.

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "moegraft/generate/prompt.h"
#include "moegraft/generate/sampling.h"

namespace moegraft::generate {

struct TextOptions {
  int64_t max_tokens = 128;
  int64_t n = 1;  // continuations per prompt
  SamplingOptions sampling;
  uint64_t seed = 0;
  DecodeSteps steps = DecodeSteps::automatic;
  // Called with whole UTF-8 characters as they become known.
  std::function<void(int64_t prompt, int64_t index, std::string_view text)> on_text;
};

struct TextResult {
  int64_t prompt = 0, index = 0;
  std::vector<int64_t> ids;  // without EOS
  std::string text;          // what the continuation adds
  bool ended = false;        // by EOS; false: max_tokens reached
};

// A text ends at every EOS id of the base's config.json and generation_config.json and at the tokenizer's.
// Only text ids that the tokenizer knows are drawn; the rows of new modalities are never looked at. One random stream
// per (prompt, index), as for pictures. UsageError: no prompts, an option out of range. UserError: no tokenizer, prompt
// and max_tokens do not fit the model's positions.
std::vector<TextResult> generate_text(const graft::GraftedModel& model, const std::vector<Prompt>& prompts,
                                      const TextOptions& options = {});
std::vector<TextResult> generate_text(const graft::GraftedModel& model, const std::vector<std::string>& prompts,
                                      const TextOptions& options = {});

}  // namespace moegraft::generate
