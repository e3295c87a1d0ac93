#include "moegraft/evaluate/captions.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/model/device.h"

namespace moegraft::evaluate {
namespace {

constexpr int64_t kTokensPerBatch = 4096;

struct Sum {
  double nll = 0;
  int64_t labels = 0;
};

// Labels of the modality alone, in batches of whole sequences.
Sum sum_likelihood(const graft::GraftedModel& model, size_t set, const std::vector<data::Sequence>& sequences) {
  const at::NoGradGuard no_grad;
  Sum sum;
  std::vector<data::Sequence> batch;
  int64_t tokens = 0;
  const auto flush = [&] {
    if (batch.empty()) return;
    const model::PackedBatch b = model::to_device(data::pack(batch), model.device());
    const auto loss = model::cross_entropy_loss(*model.decoder, model.decoder->forward(b), b);
    sum.nll += loss.nll_sum_M[int64_t(set)].item<double>();
    sum.labels += loss.count_M[set];
    batch.clear();
    tokens = 0;
  };
  for (const auto& sequence : sequences) {
    if (tokens + sequence.size() > kTokensPerBatch) flush();
    batch.push_back(sequence);
    tokens += sequence.size();
  }
  flush();
  return sum;
}

// The picture of one item between the caption of another (or of none).
data::Sequence sequence_of(const CaptionedItem& picture, const CaptionedItem* caption,
                           const model::Vocabulary& vocabulary, int64_t modality, const data::DataConfig& rules) {
  std::vector<data::Segment> segments;
  if (caption && !caption->before.empty()) segments.push_back({0, caption->before});
  segments.push_back({modality, picture.codes});
  if (caption && !caption->after.empty()) segments.push_back({0, caption->after});
  return data::assemble(segments, vocabulary, rules);
}

bool alike(const CaptionedItem& a, const CaptionedItem& b) {
  return a.codes == b.codes || (a.before == b.before && a.after == b.after);
}

}  // namespace

std::vector<CaptionedItem> read_captioned_items(const std::string& shards, const model::Vocabulary& vocabulary,
                                                const model::ModalityTokens& tokens, int64_t max_items) {
  const data::Source source(shards, vocabulary);
  std::vector<int64_t> found;
  for (int64_t i = 0; i < source.num_documents(); ++i) {
    const auto segments = source.document(i);
    const bool has = std::any_of(segments.begin(), segments.end(),
                                 [&](const data::Segment& s) { return s.modality == tokens.modality; });
    if (has && data::is_captioned_item(segments, vocabulary)) found.push_back(i);
  }
  MOEGRAFT_CHECK(!found.empty(), shards, " holds no document with a caption and exactly one ", tokens.name);
  const int64_t total = static_cast<int64_t>(found.size()), count = std::min(total, max_items);
  std::vector<CaptionedItem> items;
  for (int64_t k = 0; k < count; ++k) {
    CaptionedItem item;
    for (const auto& segment : source.document(found[k * total / count])) {
      auto& into = segment.modality != 0 ? item.codes : item.codes.empty() ? item.before : item.after;
      into.insert(into.end(), segment.ids.begin(), segment.ids.end());
    }
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<int64_t> borrow_captions(const std::vector<CaptionedItem>& items, uint64_t seed) {
  const int64_t n = static_cast<int64_t>(items.size());
  const auto order = Rng(seed, "evaluate.captions").permutation(n);
  std::vector<int64_t> lender(items.size(), -1);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t ahead = 1; ahead < n && lender[order[i]] < 0; ++ahead)
      if (const int64_t other = order[(i + ahead) % n]; !alike(items[order[i]], items[other])) lender[order[i]] = other;
  for (const int64_t i : lender)
    MOEGRAFT_CHECK(i >= 0, "captions cannot be shuffled: all ", n, " pictures or captions are alike");
  return lender;
}

double Unigram::nll(int64_t symbol) const {
  const double total = std::accumulate(counts.begin(), counts.end(), 0.0) + double(counts.size());
  return std::log(total) - std::log(double(counts.at(size_t(symbol))) + 1);
}

double Unigram::nll(const std::vector<CaptionedItem>& items) const {
  double sum = 0;
  int64_t labels = 0;
  for (const auto& item : items) {
    for (const int32_t code : item.codes) sum += nll(code);
    sum += nll(int64_t(counts.size()) - 1);
    labels += int64_t(item.codes.size()) + 1;
  }
  return sum / double(labels);
}

Unigram count_codes(const std::vector<std::string>& shards, const model::Vocabulary& vocabulary,
                    const model::ModalityTokens& tokens) {
  Unigram unigram{std::vector<int64_t>(size_t(tokens.num_codes) + 1, 0)};
  for (const auto& path : shards) {
    const data::Source source(path, vocabulary);
    for (int64_t i = 0; i < source.num_documents(); ++i)
      for (const auto& segment : source.document(i)) {
        if (segment.modality != tokens.modality) continue;
        for (const int32_t code : segment.ids) ++unigram.counts[size_t(code)];
        unigram.counts.back() += int64_t(segment.ids.size()) / tokens.item_length;
      }
  }
  MOEGRAFT_CHECK(unigram.counts.back() > 0, "the unigram baseline finds no ", tokens.name, " in ", shards);
  return unigram;
}

CaptionUse measure_captions(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                            const std::vector<CaptionedItem>& items, const data::DataConfig& rules, uint64_t seed) {
  data::DataConfig quiet = rules;
  quiet.caption_labels = false;
  const int64_t most = model.decoder->spec().max_positions;
  size_t set = 0;
  const auto& rows = model.decoder->rows();
  for (size_t r = 0; r < rows.size(); ++r)
    if (rows[r].modality == tokens.modality) set = r + 1;
  MOEGRAFT_CHECK(set > 0, "the model has no rows for ", tokens.name);
  const auto lender = borrow_captions(items, seed);
  std::vector<data::Sequence> with, without, shuffled;
  for (size_t i = 0; i < items.size(); ++i) {
    with.push_back(sequence_of(items[i], &items[i], model.vocabulary, tokens.modality, quiet));
    without.push_back(sequence_of(items[i], nullptr, model.vocabulary, tokens.modality, quiet));
    shuffled.push_back(sequence_of(items[i], &items[size_t(lender[i])], model.vocabulary, tokens.modality, quiet));
    const int64_t length = std::max(with.back().size(), shuffled.back().size());
    MOEGRAFT_CHECK(most <= 0 || length <= most, "a caption and its ", tokens.name, " need ", length,
                   " positions, the model has ", most);
  }
  const Sum a = sum_likelihood(model, set, with), b = sum_likelihood(model, set, without),
            c = sum_likelihood(model, set, shuffled);
  return {int64_t(items.size()), a.labels, a.nll / double(a.labels), b.nll / double(b.labels),
          c.nll / double(c.labels)};
}

}  // namespace moegraft::evaluate
