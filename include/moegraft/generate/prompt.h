#pragma once
// Prompts of text and pictures, and the tokens that they become.

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "moegraft/graft/grafted_model.h"

namespace moegraft::generate {

struct PromptPart {
  std::string modality;         // empty: text
  std::string text;             // text only
  std::filesystem::path image;  // a picture file that the modality's codec encodes, or
  at::Tensor codes_L;           // its codes (int64), when defined
};
using Prompt = std::vector<PromptPart>;

inline Prompt text_prompt(std::string text) { return {{"", std::move(text), {}, {}}}; }

// "a cat <image:cat.png> in the rain": <NAME:FILE> is a picture when NAME is a modality of the model; blanks around it
// are dropped. What is nearly one, <imag:cat.png> or <image:cat.png, is text, with a warning. UsageError: <image:…> for
// a model without that modality, an empty file name.
Prompt parse_prompt(const std::string& text, const model::Vocabulary& vocabulary);

struct PromptTokens {
  std::vector<int64_t> ids, modality;
  int64_t size() const { return static_cast<int64_t>(ids.size()); }
};

// As training data is laid out (data::assemble): BOS where the run and the tokenizer have it, text, begin + codes + end
// for each picture; no EOS. UserError: no tokenizer, a text id outside the base's vocabulary, a picture that does not
// decode, a codec that does not fit the vocabulary.
PromptTokens tokenize(const graft::GraftedModel& model, const Prompt& prompt);

// What a dropped caption leaves: BOS (where there is one), nothing else.
PromptTokens unconditional(const graft::GraftedModel& model);

// The modality to draw: `name`, or when empty the model's only one (or "image"). UsageError when the model has none, or
// several and no name.
const model::ModalityTokens& find_modality(const graft::GraftedModel& model, const std::string& name);

}  // namespace moegraft::generate
