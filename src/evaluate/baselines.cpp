#include "moegraft/evaluate/baselines.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "gallery.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"
#include "moegraft/data/sequence.h"
#include "moegraft/evaluate/ridge.h"
#include "moegraft/generate/prompt.h"
#include "moegraft/model/device.h"

namespace moegraft::evaluate {
namespace {

constexpr int64_t kSide = 12;  // pixels a side: finer ones cost more and rank no better
constexpr int64_t kRowsAtOnce = 1024, kTokensPerBatch = 4096;
const std::vector<double> kRatios = {1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1, 10};

using Captions = std::vector<std::string>;

// Captions as features: [N, F] of N captions.
class Probe {
 public:
  virtual ~Probe() = default;
  virtual int64_t features() const = 0;
  virtual at::Tensor encode(const Captions& captions) const = 0;
};

class BagOfWords : public Probe {
 public:
  BagOfWords(const Captions& captions, int64_t max_words) {
    std::map<std::string, int64_t> counts;
    for (const auto& caption : captions)
      for (const auto& word : words_of(caption)) ++counts[word];
    std::vector<std::pair<std::string, int64_t>> words(counts.begin(), counts.end());
    std::stable_sort(words.begin(), words.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
    if (int64_t(words.size()) > max_words) words.resize(size_t(max_words));
    for (const auto& [word, count] : words) index_.emplace(word, int64_t(index_.size()));
  }
  int64_t features() const override { return int64_t(index_.size()); }
  // Sparse. A caption is scaled to unit length: what its words say is shared between them (without it a long caption
  // counts for more).
  at::Tensor encode(const Captions& captions) const override {
    std::vector<int64_t> rows, columns;
    std::vector<double> values;
    for (size_t n = 0; n < captions.size(); ++n) {
      std::map<int64_t, double> counts;
      double norm = 0;
      for (const auto& word : words_of(captions[n]))
        if (const auto found = index_.find(word); found != index_.end()) ++counts[found->second];
      for (const auto& [column, count] : counts) norm += count * count;
      for (const auto& [column, count] : counts)
        rows.push_back(int64_t(n)), columns.push_back(column), values.push_back(count / std::sqrt(norm));
    }
    const at::Tensor places = at::stack({at::tensor(rows, at::kLong), at::tensor(columns, at::kLong)});
    return at::sparse_coo_tensor(places, at::tensor(values, at::kDouble), {int64_t(captions.size()), features()})
        .coalesce();
  }

 private:
  std::map<std::string, int64_t> index_;
};

// Means over a caption's tokens of the last hidden states and of the embeddings, each scaled to unit length: on the
// quickstart's base the two together find 43 % of compositions, states alone 10, embeddings alone 4. The graft's text
// runs the base's very code, so these are the base's.
class BaseStates : public Probe {
 public:
  explicit BaseStates(const graft::GraftedModel& model) : model_(model) {}
  int64_t features() const override { return 2 * model_.decoder->spec().hidden_size; }
  at::Tensor encode(const Captions& captions) const override {
    const kernels::Matrix embedding_VD = model_.decoder->base().weights->embedding_VD();
    const int64_t most = model_.decoder->spec().max_positions;
    std::vector<at::Tensor> encoded;
    std::vector<data::Sequence> batch;
    int64_t tokens = 0;
    const auto flush = [&] {
      const model::PackedBatch packed = model::to_device(data::pack(batch), model_.device());
      const auto on_host = [](const at::Tensor& x_TD) { return x_TD.to(at::kCPU, at::kFloat); };
      const at::Tensor hidden_TD = on_host(model_.decoder->forward(packed).hidden_TD),
                       embedded_TD = on_host(kernels::embedding(embedding_VD, packed.ids_T, at::kFloat));
      int64_t first = 0;
      for (const auto& s : batch) {
        // BOS is no part of the caption, and its state says nothing of it.
        const int64_t skip = s.size() > 1 && s.ids[0] == model_.vocabulary.bos_id ? 1 : 0;
        const auto mean_of = [&](const at::Tensor& x_TD) {
          const at::Tensor mean_D = x_TD.narrow(0, first + skip, s.size() - skip).mean(0);
          return mean_D / mean_D.norm().clamp_min(1e-12);
        };
        encoded.push_back(at::cat({mean_of(hidden_TD), mean_of(embedded_TD)}));
        first += s.size();
      }
      batch.clear(), tokens = 0;
    };
    for (const auto& caption : captions) {
      auto prompt = generate::tokenize(model_, generate::text_prompt(caption));
      MOEGRAFT_CHECK(prompt.size() > 0, "the caption \"", caption, "\" has no token");
      if (most > 0 && prompt.size() > most) prompt.ids.resize(size_t(most)), prompt.modality.resize(size_t(most));
      if (!batch.empty() && tokens + prompt.size() > kTokensPerBatch) flush();
      tokens += prompt.size();
      std::vector<int64_t> none(prompt.ids.size(), model::kNoLabel);
      batch.push_back({std::move(prompt.ids), std::move(prompt.modality), std::move(none), true});
    }
    if (!batch.empty()) flush();
    return at::stack(encoded);
  }

 private:
  const graft::GraftedModel& model_;
};

// Captions with their pictures; those of the held-out pictures last.
struct Rows {
  Captions captions;
  std::vector<int64_t> picture;
  int64_t num_fitted = 0;
  at::Tensor pixels_MP;
};

Rows read_rows(const BaselineSection& section, const codec::ImageCodec& codec) {
  Gallery gallery(codec, kSide);
  const auto pictures = read_pictures(section.manifest, gallery, section.max_pictures, section.seed);
  MOEGRAFT_CHECK(pictures.size() > 1, section.manifest, " holds one captioned picture; a regression needs several");
  const int64_t total = int64_t(pictures.size()), held_out = std::max<int64_t>(1, total / 10);
  const auto order = Rng(uint64_t(section.seed), "evaluate.baselines").permutation(total);
  Rows rows;
  for (int64_t k = 0; k < total; ++k) {
    if (k == total - held_out) rows.num_fitted = int64_t(rows.captions.size());
    const auto& picture = pictures[size_t(order[size_t(k)])];
    rows.captions.insert(rows.captions.end(), picture.captions.begin(), picture.captions.end());
    rows.picture.resize(rows.captions.size(), picture.picture);
  }
  rows.pixels_MP = gallery.stacked().flatten(1);
  return rows;
}

struct Task {
  std::string name;
  Captions prompts;
  std::vector<int64_t> target_N;
  at::Tensor candidates_M3HW;
};

std::vector<Task> read_tasks(const std::vector<RetrievalSection>& sections, const codec::ImageCodec& codec) {
  std::vector<Task> tasks;
  for (const auto& section : sections) {
    const auto [gallery, prompts] = read_task(section, codec, kSide);
    Task task{section.name, {}, {}, gallery.stacked()};
    for (const auto& prompt : prompts)
      task.prompts.push_back(prompt.captions.front()), task.target_N.push_back(prompt.picture);
    tasks.push_back(std::move(task));
  }
  return tasks;
}

ProbeFit fit_probe(const Probe& probe, const std::string& name, const Rows& rows, const std::vector<Task>& tasks) {
  const int64_t total = int64_t(rows.captions.size());
  const int64_t pixels = rows.pixels_MP.size(1);
  NormalEquations fitted(probe.features(), pixels), held_out(probe.features(), pixels);
  Progress progress("baseline: " + name, total);
  for (int64_t begin = 0; begin < total;) {
    NormalEquations& sums = begin < rows.num_fitted ? fitted : held_out;
    const int64_t end = std::min(begin + kRowsAtOnce, begin < rows.num_fitted ? rows.num_fitted : total);
    const Captions part(rows.captions.begin() + begin, rows.captions.begin() + end);
    const std::vector<int64_t> pictures(rows.picture.begin() + begin, rows.picture.begin() + end);
    sums.add(probe.encode(part), rows.pixels_MP.index_select(0, at::tensor(pictures, at::kLong)));
    progress.update(begin = end);
  }
  progress.finish();
  const ChosenRidge chosen = choose_ridge(fitted, held_out, kRatios);
  ProbeFit fit{probe.features(), chosen.ridge.lambda, chosen.held_out_error, {}};
  for (const auto& task : tasks) {
    const at::Tensor drawn_NP = chosen.ridge.predict(probe.encode(task.prompts));
    at::IntArrayRef shape = task.candidates_M3HW.sizes();
    fit.rankings[task.name] = rank_pictures(drawn_NP.to(at::kFloat).view({-1, shape[1], shape[2], shape[3]}),
                                            task.candidates_M3HW, task.target_N);
  }
  return fit;
}

}  // namespace

Baselines measure_baselines(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                            const BaselineSection& section, const std::vector<RetrievalSection>& tasks) {
  const at::NoGradGuard no_grad;
  const auto start = std::chrono::steady_clock::now();
  const codec::ImageCodec& codec = codec_of(model, tokens);
  const Rows rows = read_rows(section, codec);
  const auto read = read_tasks(tasks, codec);
  Baselines result;
  result.captions = int64_t(rows.captions.size());
  result.pictures = rows.pixels_MP.size(0);
  for (const auto& task : read) result.candidates[task.name] = task.candidates_M3HW.size(0);
  result.bag_of_words = fit_probe(BagOfWords(rows.captions, section.max_words), "bag of words", rows, read);
  if (section.states) result.base_states = fit_probe(BaseStates(model), "base states", rows, read);
  result.seconds = seconds_since(start);
  return result;
}

}  // namespace moegraft::evaluate
