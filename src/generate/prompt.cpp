#include "moegraft/generate/prompt.h"

#include "libtorch.h"

#include <algorithm>
#include <cctype>
#include <deque>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/data/sequence.h"
#include "moegraft/io/image.h"

namespace moegraft::generate {
namespace {

bool has_modality(const model::Vocabulary& vocabulary, const std::string& name) {
  for (const auto& tokens : vocabulary.modalities)
    if (tokens.name == name) return true;
  return false;
}

bool is_name(std::string_view text) {
  for (const char c : text)
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-') return false;
  return !text.empty();
}

// What was probably meant as a picture: <imag:x.png>, or <image:x.png without its end. "a <b: c" is text like any
// other.
bool looks_like_picture(const std::string& piece, const model::Vocabulary& vocabulary) {
  std::vector<std::string> names;
  for (const auto& tokens : vocabulary.modalities) names.push_back(tokens.name);
  const size_t colon = piece.find(':');
  const std::string name = trim(std::string_view(piece).substr(1, colon == std::string::npos ? 0 : colon - 1));
  return !names.empty() && is_name(name) &&
         (!nearest_word(lower_case(name), names).empty() || io::has_picture_extension(trim(piece.substr(colon + 1))));
}

data::DataConfig token_rules(const graft::GraftedModel& model) {
  data::DataConfig rules = model.config ? model.config->data : data::DataConfig{};
  rules.add_eos = false;
  return rules;
}

at::Tensor codes_of(const graft::GraftedModel& model, const model::ModalityTokens& tokens, const PromptPart& part) {
  if (part.codes_L.defined()) {
    MOEGRAFT_CHECK(part.codes_L.dim() == 1 && part.codes_L.size(0) == tokens.item_length &&
                       part.codes_L.scalar_type() == at::kLong,
                   "codes of an ", tokens.name, " must be int64 [", tokens.item_length, "], got ",
                   c10::toString(part.codes_L.scalar_type()), " ", part.codes_L.sizes().vec());
    return part.codes_L.to(at::kCPU).contiguous();
  }
  const codec::ImageCodec* codec = graft::find_image_codec(model, tokens.name);
  MOEGRAFT_CHECK(codec, "the prompt holds ", part.image.string(), ", but the model was opened without the codec of ",
                 tokens.name);
  const at::Tensor pixels = codec->prepare(io::load_image(part.image)).unsqueeze(0).to(model.device());
  const at::Tensor codes = codec->encode(pixels).to(at::kCPU).reshape({-1}).contiguous();
  MOEGRAFT_CHECK(codes.size(0) == tokens.item_length, "the codec of ", tokens.name, " makes ", codes.size(0),
                 " codes of a picture, the model expects ", tokens.item_length);
  return codes;
}

}  // namespace

Prompt parse_prompt(const std::string& text, const model::Vocabulary& vocabulary) {
  Prompt prompt;
  std::string pending;
  const auto flush = [&](bool before_picture) {
    const bool beside = before_picture || !prompt.empty();
    const std::string piece = beside ? trim(pending) : pending;
    if (!piece.empty()) prompt.push_back({"", piece, {}, {}});
    pending.clear();
  };
  size_t at = 0;
  while (at < text.size()) {
    const size_t close = text[at] == '<' ? text.find('>', at) : std::string::npos;
    const size_t colon = close == std::string::npos ? close : text.find(':', at);
    const std::string name =
        colon != std::string::npos && colon < close ? text.substr(at + 1, colon - at - 1) : std::string();
    const bool known = is_name(name) && has_modality(vocabulary, name);
    if (!known) {
      MOEGRAFT_CHECK_USAGE(name != "image", "the prompt holds ", text.substr(at, close + 1 - at),
                           ", but the model has no modality \"image\"",
                           vocabulary.modalities.empty() ? ": it has text only" : "");
      if (text[at] == '<') {
        const size_t end = std::min({close, text.find('<', at + 1), text.size()});
        const bool closed = end == close;
        const std::string piece = text.substr(at, end - at);
        if (looks_like_picture(piece, vocabulary))
          log::warning("the prompt holds ", shortened(piece), closed ? ">" : "", " as text: a picture is written <",
                       vocabulary.modalities.front().name, ":picture.png>", closed ? "" : ", with its >");
      }
      pending += text[at++];
      continue;
    }
    const std::string file = trim(std::string_view(text).substr(colon + 1, close - colon - 1));
    MOEGRAFT_CHECK_USAGE(!file.empty(), "the prompt holds <", name, ":> without a file name: write <", name,
                         ":picture.png>");
    flush(true);
    prompt.push_back({name, "", file, {}});
    at = close + 1;
  }
  flush(false);
  return prompt;
}

PromptTokens tokenize(const graft::GraftedModel& model, const Prompt& prompt) {
  std::deque<std::vector<int32_t>> storage;  // segments are views
  std::vector<data::Segment> segments;
  for (const PromptPart& part : prompt) {
    auto& ids = storage.emplace_back();
    if (part.modality.empty()) {
      if (part.text.empty()) continue;
      MOEGRAFT_CHECK(model.tokenizer != nullptr, model.path.string(),
                     " has no tokenizer (tokenizer.json or tokenizer.model), so prompts cannot be read");
      for (const int64_t id : model.tokenizer->encode(part.text)) {
        // An id beyond the embedding would be taken for one of the new modality's.
        MOEGRAFT_CHECK(id >= 0 && id < model.vocabulary.text_size, "the tokenizer gives id ", id, " for \"", part.text,
                       "\", the model's text vocabulary has ", model.vocabulary.text_size,
                       " ids: tokenizer and model do not belong together");
        ids.push_back(static_cast<int32_t>(id));
      }
      segments.push_back({0, ids});
      continue;
    }
    const model::ModalityTokens& tokens = find_modality(model, part.modality);
    const at::Tensor codes = codes_of(model, tokens, part);
    for (int64_t i = 0; i < codes.size(0); ++i) {
      const int64_t code = codes.const_data_ptr<int64_t>()[i];
      const int64_t first = tokens.first_code(i), end = first + tokens.codebook_size();
      MOEGRAFT_CHECK(code >= first && code < end, "code ", code, " of ", tokens.name, " is outside [", first, ", ", end,
                     ")", tokens.codebooks > 1 ? detail::concat(", the codebook of place ", i) : "");
      ids.push_back(static_cast<int32_t>(code));
    }
    segments.push_back({tokens.modality, ids});
  }
  data::Sequence sequence = data::assemble(segments, model.vocabulary, token_rules(model));
  return {std::move(sequence.ids), std::move(sequence.modality)};
}

PromptTokens unconditional(const graft::GraftedModel& model) {
  data::Sequence sequence = data::assemble({}, model.vocabulary, token_rules(model), true);
  return {std::move(sequence.ids), std::move(sequence.modality)};
}

const model::ModalityTokens& find_modality(const graft::GraftedModel& model, const std::string& name) {
  const auto& all = model.vocabulary.modalities;
  std::vector<std::string> known;
  for (const auto& tokens : all) {
    if (tokens.name == name || (name.empty() && (all.size() == 1 || tokens.name == "image"))) return tokens;
    known.push_back(tokens.name);
  }
  MOEGRAFT_CHECK_USAGE(!all.empty(), "no modality \"", name.empty() ? "image" : name, "\" in ", model.path.string(),
                       ": this model has text only, so it cannot draw (use --text)");
  fail<UsageError>(name.empty() ? std::string("name the modality to draw")
                                : "no modality \"" + name + "\" in " + model.path.string(),
                   "; the model has ", join(known, ", "));
}

}  // namespace moegraft::generate
