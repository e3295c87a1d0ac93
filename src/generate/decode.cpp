#include "decode.h"

#include "libtorch.h"

#include <numeric>

#include "moegraft/base/check.h"

namespace moegraft::generate {
namespace {

at::Tensor on_device(const std::vector<int64_t>& values, at::Device device) {
  return at::tensor(at::ArrayRef<int64_t>(values), at::kLong).to(device);
}

model::KvCache make_cache(const graft::GraftedModel& model, int64_t length) {
  return model::KvCache(model.decoder->spec(), 1, length, model.decoder->dtype(), model.device());
}

}  // namespace

Prefix prefill(const graft::GraftedModel& model, const PromptTokens& tokens) {
  MOEGRAFT_CHECK(tokens.size() > 0, "the prompt is empty and the model has no BOS token: there is nothing to continue");
  Prefix prefix{make_cache(model, tokens.size()), {}};
  std::vector<int64_t> positions(tokens.ids.size());
  std::iota(positions.begin(), positions.end(), 0);
  model::PackedBatch batch;
  batch.ids_T = on_device(tokens.ids, model.device());
  batch.modality_T = on_device(tokens.modality, model.device());
  batch.positions_T = on_device(positions, model.device());
  batch.cu_seqlens = {0, tokens.size()};
  model::ForwardOptions options;
  options.cache = &prefix.cache;
  prefix.hidden_1D = model.decoder->forward(batch, options).hidden_TD.narrow(0, tokens.size() - 1, 1);
  return prefix;
}

DecodeSteps decode_steps(DecodeSteps asked, at::Device device) {
  if (asked != DecodeSteps::automatic) return asked;
  return device.is_cuda() ? DecodeSteps::fixed : DecodeSteps::plain;
}

Steps::Steps(const graft::GraftedModel& model, model::KvCache& cache, int64_t count, int64_t modality, Head head,
             DecodeSteps how)
    : model_(model),
      cache_(cache),
      modality_(modality),
      head_(std::move(head)),
      factors_(model::make_factor_caches(model.decoder->spec())) {
  how = decode_steps(how, model.device());
  if (how != DecodeSteps::plain)
    fixed_.emplace(*model.decoder, cache, count, modality, head_, how == DecodeSteps::recorded);
}

at::Tensor Steps::operator()(const std::vector<int64_t>& ids) {
  if (fixed_) return (*fixed_)(ids);
  const int64_t count = static_cast<int64_t>(ids.size());
  std::vector<int64_t> positions(ids.size());
  model::PackedBatch batch;
  for (int64_t i = 0; i <= count; ++i) {
    batch.cu_seqlens.push_back(i);
    if (i < count) positions[i] = cache_.length(i);
  }
  batch.ids_T = on_device(ids, model_.device());
  batch.positions_T = on_device(positions, model_.device());
  batch.modality_T = at::full({count}, modality_, batch.ids_T.options());
  model::ForwardOptions options;
  options.cache = &cache_;
  options.factors = &factors_;
  return head_(model_.decoder->forward(batch, options).hidden_TD);
}

void check_positions(const graft::GraftedModel& model, int64_t prompt, int64_t prompt_tokens, int64_t more,
                     const char* what) {
  const int64_t room = model.decoder->spec().max_positions;
  if (room <= 0) return;
  MOEGRAFT_CHECK(prompt_tokens + more <= room, "prompt ", prompt, " has ", prompt_tokens, " tokens and ", what,
                 " needs ", more, " more, but the model has ", room, " positions: shorten the prompt by ",
                 prompt_tokens + more - room, " tokens",
                 more > 1 && std::string_view(what) == "max_tokens" ? " or lower --max-tokens" : "");
}

uint64_t stream_index(const PromptTokens& tokens, int64_t index) {
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a, 64 bits
  const auto mix = [&](uint64_t value) {
    for (int shift = 0; shift < 64; shift += 8) hash = (hash ^ ((value >> shift) & 0xff)) * 0x100000001b3ull;
  };
  for (const int64_t id : tokens.ids) mix(static_cast<uint64_t>(id));
  mix(static_cast<uint64_t>(index));
  return hash;
}

}  // namespace moegraft::generate
