#include "moegraft/evaluate/likelihood_ranking.h"

#include <algorithm>
#include <chrono>
#include <map>

#include "gallery.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/rng.h"
#include "moegraft/data/sequence.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/generate/prompt.h"

namespace moegraft::evaluate {
namespace {

constexpr int64_t kTokensPerBatch = 4096, kEncodeBatch = 64;
constexpr int64_t kNoCaption = -1;
constexpr int64_t kSpare = 4;  // times as many pictures are read as are asked for: some are alike

struct Item {
  generate::PromptTokens caption;
  std::vector<int64_t> codes;  // token ids
  bool alike(const Item& other) const { return codes == other.codes || caption.ids == other.caption.ids; }
};

std::vector<Item> read_items(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                             const RankingSection& section) {
  const codec::ImageCodec& codec = codec_of(model, tokens);
  Gallery gallery(codec);
  const auto pictures =
      read_pictures(section.manifest, gallery, kSpare * std::max(section.n, section.candidates), section.seed);
  std::vector<at::Tensor> parts;
  for (const auto& part : gallery.stacked().split(kEncodeBatch))
    parts.push_back(codec.encode(part.to(model.device())).to(at::kCPU));
  const at::Tensor ids_ML = at::cat(parts).add_(tokens.code_id(0)).contiguous();
  const int64_t length = ids_ML.size(1), most = model.decoder->spec().max_positions;
  std::vector<Item> items;
  for (const auto& picture : pictures) {
    const int64_t* ids = ids_ML.const_data_ptr<int64_t>() + picture.picture * length;
    items.push_back({generate::tokenize(model, generate::text_prompt(picture.captions.front())), {ids, ids + length}});
    const int64_t needed = items.back().caption.size() + 1 + length;
    MOEGRAFT_CHECK(most <= 0 || needed <= most, section.manifest, ": \"", picture.captions.front(), "\" and its ",
                   tokens.name, " need ", needed, " positions, the model has ", most);
  }
  return items;
}

// Caption, begin and codes; labels are the codes and end.
data::Sequence sequence_of(const generate::PromptTokens& caption, const std::vector<int64_t>& codes,
                           const model::ModalityTokens& tokens) {
  data::Sequence s{caption.ids, caption.modality, std::vector<int64_t>(caption.ids.size(), model::kNoLabel), false};
  s.ids.push_back(tokens.begin_id());
  s.ids.insert(s.ids.end(), codes.begin(), codes.end());
  s.modality.resize(s.ids.size(), tokens.modality);
  s.labels.insert(s.labels.end(), codes.begin(), codes.end());
  s.labels.push_back(tokens.end_id());
  return s;
}

// Nats of a picture after a caption, by the indices of both; each pair is computed once.
using Pairs = std::map<std::pair<int64_t, int64_t>, double>;

void score(const graft::GraftedModel& model, const model::ModalityTokens& tokens, const std::vector<Item>& items,
           const std::string& name, Pairs& pairs) {
  const generate::PromptTokens nothing = generate::unconditional(model);
  Progress progress("ranking " + name, int64_t(pairs.size()));
  std::vector<data::Sequence> batch;
  std::vector<double*> results;
  int64_t batch_tokens = 0, done = 0;
  const auto flush = [&] {
    const auto nll = sequence_nll(model, tokens, batch);
    for (size_t i = 0; i < nll.size(); ++i) *results[i] = nll[i];
    progress.update(done += int64_t(nll.size()));
    batch.clear(), results.clear(), batch_tokens = 0;
  };
  for (auto& [pair, nll] : pairs) {
    const auto& caption = pair.first == kNoCaption ? nothing : items[size_t(pair.first)].caption;
    data::Sequence sequence = sequence_of(caption, items[size_t(pair.second)].codes, tokens);
    if (!batch.empty() && batch_tokens + sequence.size() > kTokensPerBatch) flush();
    batch_tokens += sequence.size();
    batch.push_back(std::move(sequence));
    results.push_back(&nll);
  }
  if (!batch.empty()) flush();
  progress.finish();
}

// What prompt i chooses among: itself first, then others in `order`, the same for all prompts so that pairs are shared.
std::vector<int64_t> choose_candidates(const std::vector<Item>& items, const std::vector<int64_t>& order, int64_t i,
                                       int64_t most) {
  std::vector<int64_t> chosen{i};
  for (size_t k = 0; k < order.size() && int64_t(chosen.size()) < most; ++k)
    if (!items[size_t(i)].alike(items[size_t(order[k])])) chosen.push_back(order[k]);
  return chosen;
}

// Adds the rank of candidates[0] by rising cost.
template <class Cost>
void rank_first(const std::vector<int64_t>& candidates, const Cost& cost, std::optional<Ranking>& ranking) {
  if (!ranking) ranking.emplace();
  const double right = cost(candidates[0]);
  int64_t rank = 1, nearest = candidates[0];
  double best = right;
  for (size_t k = 1; k < candidates.size(); ++k) {
    const double c = cost(candidates[k]);
    if (!(c > right)) ++rank;  // not "smaller": a tie, or NaN, counts against
    if (c < best) best = c, nearest = candidates[k];
  }
  ranking->rank_N.push_back(rank);
  ranking->nearest_N.push_back(nearest);
}

}  // namespace

double LikelihoodRanking::chance(int64_t k) const {
  double sum = 0;
  for (const int64_t candidates : candidates_N) sum += chance_of_top(k, candidates);
  return sum / double(std::max<size_t>(1, candidates_N.size()));
}

LikelihoodRanking rank_likelihoods(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                                   const RankingSection& section) {
  const auto start = std::chrono::steady_clock::now();
  const auto items = read_items(model, tokens, section);
  const auto order = Rng(uint64_t(section.seed), "evaluate.ranking").permutation(int64_t(items.size()));
  const bool to_caption = section.direction != "caption_to_image", to_image = section.direction != "image_to_caption";

  std::vector<std::vector<int64_t>> choices;
  Pairs pairs;
  for (const int64_t i : order) {
    if (int64_t(choices.size()) == section.n) break;
    choices.push_back(choose_candidates(items, order, i, section.candidates));
    MOEGRAFT_CHECK(choices.back().size() > 1, section.manifest,
                   " has nothing to choose among: all its captions or pictures are alike");
    for (const int64_t other : choices.back()) {
      if (to_caption) pairs[{other, i}] = 0;
      if (to_image) pairs[{i, other}] = pairs[{kNoCaption, other}] = 0;
    }
  }
  score(model, tokens, items, section.name, pairs);

  LikelihoodRanking result;
  for (const auto& candidates : choices) {
    const int64_t i = candidates[0];
    result.prompt_N.push_back(i);
    result.candidates_N.push_back(int64_t(candidates.size()));
    if (to_caption) rank_first(candidates, [&](int64_t c) { return pairs.at({c, i}); }, result.captions);
    if (!to_image) continue;
    rank_first(candidates, [&](int64_t c) { return pairs.at({i, c}); }, result.pictures);
    rank_first(
        candidates, [&](int64_t c) { return pairs.at({i, c}) - pairs.at({kNoCaption, c}); }, result.pictures_pmi);
  }
  result.seconds = seconds_since(start);
  return result;
}

}  // namespace moegraft::evaluate
