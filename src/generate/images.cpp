#include "moegraft/generate/images.h"

#include <ATen/Parallel.h>
#include "libtorch.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "decode.h"
#include "moegraft/base/check.h"

namespace moegraft::generate {
namespace {

// One call: what all its pictures share.
struct Drawing {
  const graft::GraftedModel& model;
  const ImageOptions& options;
  const model::ModalityTokens& tokens;
  bool guided;
  at::Tensor
      head_ND;  // in the dtype that is computed in: every step would convert the rows, which are trained in float32
};

const model::ModalityRows& find_rows(const graft::GraftedModel& model, const model::ModalityTokens& tokens) {
  for (const auto& rows : model.decoder->rows())
    if (rows.modality == tokens.modality && rows.first_id == tokens.first_id) return rows;
  fail<InvariantError>("the decoder has no rows for ", tokens.name);
}

// Logits of the codes alone: begin and end can never be drawn.
at::Tensor code_logits(const Drawing& d, const at::Tensor& hidden_XD) {
  return at::linear(hidden_XD, d.head_ND).narrow(1, 2, d.tokens.num_codes);
}
at::Tensor on_host(const at::Tensor& logits) { return logits.to(at::kCPU, at::kFloat); }

at::Tensor guide(const at::Tensor& cond, const at::Tensor& uncond, double cfg) {
  return uncond + cfg * (cond - uncond);
}

int64_t pictures_at_once(const Drawing& d, int64_t total, int64_t room) {
  const auto& s = d.model.decoder->spec();
  const double bytes = 2.0 * double(s.num_layers) * double(room) * double(s.num_kv_heads * s.head_dim) *
                       double(at::elementSize(d.model.decoder->dtype())) * (d.guided ? 2 : 1);
  const auto affordable = static_cast<int64_t>(std::min(double(d.options.max_cache_bytes) / bytes, 1e9));
  return std::clamp<int64_t>(std::min(affordable, d.options.max_batch), 1, total);
}

PromptTokens with_begin(PromptTokens prompt, const model::ModalityTokens& tokens) {
  prompt.ids.push_back(tokens.begin_id());
  prompt.modality.push_back(tokens.modality);
  return prompt;
}

// A prompt's cache and the logits of its first code.
struct Start {
  Prefix prefix;
  at::Tensor logits_1N;
};

Start start(const Drawing& d, const PromptTokens& tokens) {
  Prefix prefix = prefill(d.model, tokens);
  const at::Tensor logits = on_host(code_logits(d, prefix.hidden_1D));
  return {std::move(prefix), logits};
}

// Draws the codes of `streams.size()` pictures, whose conditional sequences lie in the cache of `step` first, the
// unconditional ones (guided) behind them. logits_BN: of the first code, guidance applied. Returns int64 [B, L].
at::Tensor draw(const Drawing& d, Steps& step, at::Tensor logits_BN, std::vector<Rng>& streams,
                const std::function<void(int64_t)>& on_codes) {
  const int64_t count = static_cast<int64_t>(streams.size()), length = d.tokens.item_length;
  at::Tensor codes_BL = at::empty({count, length}, at::kLong);
  int64_t* codes = codes_BL.data_ptr<int64_t>();
  for (int64_t t = 0; t < length; ++t) {
    logits_BN = logits_BN.contiguous();
    const float* logits = logits_BN.const_data_ptr<float>();
    const int64_t all_codes = d.tokens.num_codes, N = d.tokens.codebook_size(),
                  first = d.tokens.first_code(t);  // this place takes codes of its codebook alone
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        codes[i * length + t] =
            first + sample({logits + i * all_codes + first, static_cast<size_t>(N)}, d.options.sampling, streams[i]);
    });
    on_codes(count);
    if (t + 1 == length) break;  // end is forced: nothing follows that needs its logits
    std::vector<int64_t> ids;
    for (int pass = 0; pass < (d.guided ? 2 : 1); ++pass)
      for (int64_t i = 0; i < count; ++i) ids.push_back(d.tokens.code_id(codes[i * length + t]));
    const at::Tensor all = on_host(step(ids));
    logits_BN = d.guided ? guide(all.narrow(0, 0, count), all.narrow(0, count, count), d.options.cfg) : all;
  }
  return codes_BL;
}

void check_options(const std::vector<Prompt>& prompts, const ImageOptions& o) {
  MOEGRAFT_CHECK_USAGE(!prompts.empty(), "no prompts: give at least one");
  MOEGRAFT_CHECK_USAGE(o.n >= 1, "n must be at least 1 picture per prompt, got ", o.n);
  MOEGRAFT_CHECK_USAGE(std::isfinite(o.cfg) && o.cfg >= 0, "cfg must be a number of at least 0 (1: no guidance), got ",
                       o.cfg);
  MOEGRAFT_CHECK_USAGE(o.max_batch >= 1, "max_batch must be at least 1, got ", o.max_batch);
  o.sampling.validate();
}

const codec::ImageCodec* find_codec(const graft::GraftedModel& model, const model::ModalityTokens& tokens) {
  const codec::ImageCodec* codec = graft::find_image_codec(model, tokens.name);
  MOEGRAFT_CHECK(codec, "the codec of ", tokens.name,
                 " is not loaded: open the model with its codec, or ask for ids only");
  MOEGRAFT_CHECK(codec->num_codes() == tokens.num_codes && codec->item_length() == tokens.item_length &&
                     codec->shape().codebooks == tokens.codebooks,
                 "the codec of ", tokens.name, " has ", codec->num_codes(), " codes in ", codec->shape().codebooks,
                 " codebook(s) and ", codec->item_length(), " a picture, the model was grafted for ", tokens.num_codes,
                 " in ", tokens.codebooks, " and ", tokens.item_length);
  return codec;
}

}  // namespace

std::vector<ImageResult> generate_images(const graft::GraftedModel& model, const std::vector<Prompt>& prompts,
                                         const ImageOptions& options) {
  check_options(prompts, options);
  const model::ModalityTokens& tokens = find_modality(model, options.modality);
  const at::NoGradGuard no_grad;
  const Drawing d{model, options, tokens, options.cfg != 1.0,
                  find_rows(model, tokens).head_ND.to(model.decoder->dtype())};
  const codec::ImageCodec* codec = options.pixels ? find_codec(model, tokens) : nullptr;

  std::vector<PromptTokens> prefixes;
  int64_t longest = 0;
  for (size_t p = 0; p < prompts.size(); ++p) {
    prefixes.push_back(with_begin(tokenize(model, prompts[p]), tokens));
    check_positions(model, static_cast<int64_t>(p), prefixes.back().size(), tokens.item_length + 1, "a picture");
    longest = std::max(longest, prefixes.back().size());
  }
  std::optional<Start> uncond;
  if (d.guided) uncond = start(d, with_begin(unconditional(model), tokens));

  const int64_t total = static_cast<int64_t>(prompts.size()) * options.n, room = longest + tokens.item_length;
  const int64_t at_once = pictures_at_once(d, total, room);
  model::KvCache cache(model.decoder->spec(), d.guided ? 2 * at_once : at_once, room, model.decoder->dtype(),
                       model.device());
  std::vector<ImageResult> results;
  std::optional<Steps> step;     // of as many sequences as the last pictures had
  std::optional<Start> current;  // of the prompt whose pictures are being placed
  int64_t current_prompt = -1, done = 0;
  for (int64_t first = 0; first < total; first += at_once) {
    const int64_t count = std::min(at_once, total - first);
    if (first == 0 || count < at_once)
      step.emplace(
          model, cache, d.guided ? 2 * count : count, tokens.modality,
          [&](const at::Tensor& hidden_XD) { return code_logits(d, hidden_XD); }, options.steps);
    std::vector<Rng> streams;
    std::vector<at::Tensor> logits;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t prompt = (first + i) / options.n, index = (first + i) % options.n;
      if (prompt != current_prompt) {
        current = start(d, prefixes[prompt]);
        current_prompt = prompt;
      }
      cache.copy_sequence(i, current->prefix.cache, 0);
      if (d.guided) cache.copy_sequence(count + i, uncond->prefix.cache, 0);
      logits.push_back(d.guided ? guide(current->logits_1N, uncond->logits_1N, options.cfg) : current->logits_1N);
      streams.emplace_back(options.seed, "generate.image", stream_index(prefixes[prompt], index));
      results.push_back({prompt, index, {}, {}});
    }
    const at::Tensor codes_BL = draw(d, *step, at::cat(logits, 0), streams, [&](int64_t codes) {
      done += codes;
      if (options.on_progress) options.on_progress(done, total * tokens.item_length);
    });
    for (int64_t i = 0; i < count; ++i) {
      ImageResult& result = results[first + i];
      result.ids_L = codes_BL[i].clone();
      // One by one: a library convolution's last bits may depend on the batch.
      if (codec)
        result.pixels_3HW = codec->decode(result.ids_L.unsqueeze(0).to(model.device())).squeeze(0).to(at::kCPU);
    }
  }
  return results;
}

std::vector<ImageResult> generate_images(const graft::GraftedModel& model, const std::vector<std::string>& prompts,
                                         const ImageOptions& options) {
  std::vector<Prompt> parsed;
  for (const auto& text : prompts) parsed.push_back(text_prompt(text));
  return generate_images(model, parsed, options);
}

}  // namespace moegraft::generate
