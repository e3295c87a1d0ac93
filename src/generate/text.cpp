#include "moegraft/generate/text.h"

#include "libtorch.h"

#include <algorithm>

#include "decode.h"
#include "moegraft/base/check.h"
#include "moegraft/model/stop_ids.h"

namespace moegraft::generate {
namespace {

// True when the last character may still change with the next token: a replacement character, or a UTF-8 sequence cut
// short.
bool ends_open(std::string_view text) {
  if (text.ends_with("\xEF\xBF\xBD")) return true;
  for (size_t back = 1; back <= std::min<size_t>(4, text.size()); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if (byte < 0x80) return false;
    if (byte >= 0xC0) return back < (byte >= 0xF0 ? 4u : byte >= 0xE0 ? 3u : 2u);
  }
  return false;
}

// Turns ids into text as they come. What an id reads as depends on its neighbours (spaces, byte pieces), so a short
// window is decoded again each time.
class TextStream {
 public:
  TextStream(const tokenizer::Tokenizer& tokenizer, std::vector<int64_t> context)
      : tokenizer_(tokenizer), ids_(std::move(context)), emitted_(ids_.size()) {}

  std::string push(int64_t id) {
    ids_.push_back(id);
    return take(false);
  }
  std::string flush() { return take(true); }

 private:
  std::string take(bool last) {
    const std::string before = tokenizer_.decode({ids_.begin() + window_, ids_.begin() + emitted_}),
                      all = tokenizer_.decode({ids_.begin() + window_, ids_.end()});
    if (all.size() <= before.size() || (!last && ends_open(all))) return {};
    window_ = emitted_;
    emitted_ = static_cast<int64_t>(ids_.size());
    return all.substr(before.size());
  }
  const tokenizer::Tokenizer& tokenizer_;
  std::vector<int64_t> ids_;
  int64_t window_ = 0, emitted_;  // [window, emitted) is context that was given out before
};

// The text at the end of the prompt, which the continuation reads on from.
std::vector<int64_t> trailing_text(const PromptTokens& tokens) {
  constexpr int64_t kContext = 8;
  int64_t begin = tokens.size();
  while (begin > 0 && tokens.size() - begin < kContext && tokens.modality[begin - 1] == 0) --begin;
  return {tokens.ids.begin() + begin, tokens.ids.end()};
}

}  // namespace

std::vector<TextResult> generate_text(const graft::GraftedModel& model, const std::vector<Prompt>& prompts,
                                      const TextOptions& options) {
  MOEGRAFT_CHECK_USAGE(!prompts.empty(), "no prompts: give at least one");
  MOEGRAFT_CHECK_USAGE(options.n >= 1, "n must be at least 1 continuation per prompt, got ", options.n);
  MOEGRAFT_CHECK_USAGE(options.max_tokens >= 1, "max_tokens must be at least 1, got ", options.max_tokens);
  options.sampling.validate();
  MOEGRAFT_CHECK(model.tokenizer != nullptr, model.path.string(),
                 " has no tokenizer (tokenizer.json or tokenizer.model), so text cannot be written");
  const at::NoGradGuard no_grad;
  std::vector<PromptTokens> prefixes;
  for (size_t p = 0; p < prompts.size(); ++p) {
    prefixes.push_back(tokenize(model, prompts[p]));
    check_positions(model, static_cast<int64_t>(p), prefixes.back().size(), options.max_tokens, "max_tokens");
  }
  // Rows beyond the tokenizer are padding of the embedding.
  const int64_t known = std::min(model.vocabulary.text_size, model.tokenizer->size());
  std::vector<int64_t> stops = model::read_eos_ids(model.base_path);
  stops.insert(stops.end(), {model.vocabulary.eos_id, model.tokenizer->eos_id()});
  const auto ends = [&](int64_t id) { return std::find(stops.begin(), stops.end(), id) != stops.end(); };
  const auto head = [&](const at::Tensor& hidden_1D) {
    return model.decoder->text_logits(hidden_1D).narrow(1, 0, known);
  };
  const auto on_host = [](const at::Tensor& logits) { return logits.to(at::kCPU, at::kFloat).contiguous(); };

  std::vector<TextResult> results;
  for (size_t p = 0; p < prompts.size(); ++p) {
    const Prefix prefix = prefill(model, prefixes[p]);
    model::KvCache cache(model.decoder->spec(), 1, prefixes[p].size() + options.max_tokens, model.decoder->dtype(),
                         model.device());
    Steps step(model, cache, 1, 0, head, options.steps);
    for (int64_t index = 0; index < options.n; ++index) {
      TextResult result{static_cast<int64_t>(p), index, {}, {}, false};
      const auto give = [&](const std::string& text) {
        result.text += text;
        if (options.on_text && !text.empty()) options.on_text(result.prompt, index, text);
      };
      Rng stream(options.seed, "generate.text", stream_index(prefixes[p], index));
      TextStream reader(*model.tokenizer, trailing_text(prefixes[p]));
      cache.copy_sequence(0, prefix.cache, 0);
      at::Tensor logits = on_host(head(prefix.hidden_1D));
      while (true) {
        const int64_t id =
            sample({logits.const_data_ptr<float>(), static_cast<size_t>(known)}, options.sampling, stream);
        result.ended = ends(id);
        if (result.ended) break;
        result.ids.push_back(id);
        give(reader.push(id));
        if (static_cast<int64_t>(result.ids.size()) == options.max_tokens) break;
        logits = on_host(step({id}));
      }
      give(reader.flush());
      results.push_back(std::move(result));
    }
  }
  return results;
}

std::vector<TextResult> generate_text(const graft::GraftedModel& model, const std::vector<std::string>& prompts,
                                      const TextOptions& options) {
  std::vector<Prompt> parsed;
  for (const auto& text : prompts) parsed.push_back(text_prompt(text));
  return generate_text(model, parsed, options);
}

}  // namespace moegraft::generate
