#include "moegraft/evaluate/retrieval.h"

#include <algorithm>
#include <chrono>

#include "gallery.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/progress.h"
#include "moegraft/generate/images.h"
#include "moegraft/io/image.h"

namespace moegraft::evaluate {
namespace {

constexpr int64_t kDistances = int64_t{1} << 24;  // pixel differences at a time: 64 MiB
constexpr int64_t kEncodeBatch = 64;
constexpr int64_t kPairsPerRow = 6;

at::Tensor reconstruct(const codec::ImageCodec& codec, const at::Tensor& pictures_M3HW, at::Device device) {
  std::vector<at::Tensor> parts;
  for (const auto& part : pictures_M3HW.split(kEncodeBatch))
    parts.push_back(codec.decode(codec.encode(part.to(device))).to(at::kCPU, at::kFloat));
  return at::cat(parts);
}

}  // namespace

double chance_of_top(int64_t k, int64_t candidates) { return std::min(1.0, double(k) / double(candidates)); }

double Ranking::top(int64_t k) const {
  return double(std::count_if(rank_N.begin(), rank_N.end(), [&](int64_t r) { return r <= k; })) /
         double(std::max<size_t>(1, rank_N.size()));
}

double Ranking::mean_rank() const {
  double sum = 0;
  for (const int64_t r : rank_N) sum += double(r);
  return sum / double(std::max<size_t>(1, rank_N.size()));
}

Ranking rank_pictures(const at::Tensor& samples_N3HW, const at::Tensor& candidates_M3HW,
                      const std::vector<int64_t>& target_N) {
  const int64_t N = samples_N3HW.size(0), M = candidates_M3HW.size(0);
  MOEGRAFT_INVARIANT(N == int64_t(target_N.size()) && samples_N3HW[0].sizes() == candidates_M3HW[0].sizes(), "samples ",
                     samples_N3HW.sizes().vec(), ", candidates ", candidates_M3HW.sizes().vec(), ", targets ",
                     target_N.size());
  const at::Tensor candidates_MX = candidates_M3HW.flatten(1).contiguous();
  const int64_t chunk = std::max<int64_t>(1, kDistances / std::max<int64_t>(1, candidates_MX.size(1)));
  Ranking ranking;
  for (int64_t n = 0; n < N; ++n) {
    const at::Tensor sample_1X = samples_N3HW[n].flatten().unsqueeze(0);
    std::vector<at::Tensor> parts;
    // Differences first, then squares: |a|^2 - 2ab + |b|^2 would lose the digits that tell near pictures apart.
    for (const auto& part : candidates_MX.split(chunk))
      parts.push_back((part - sample_1X).square_().mean(1, false, at::kDouble));
    const at::Tensor distance_M = at::cat(parts);
    const double* d = distance_M.const_data_ptr<double>();
    const int64_t target = target_N[size_t(n)];
    MOEGRAFT_INVARIANT(target >= 0 && target < M, "target ", target, " of ", M);
    int64_t rank = 1;
    for (int64_t m = 0; m < M; ++m)
      // Not "nearer than": a sample of NaN must come last.
      if (m != target && !(d[m] > d[target]) &&
          !(d[m] == d[target] && at::equal(candidates_MX[m], candidates_MX[target])))
        ++rank;
    ranking.rank_N.push_back(rank);
    ranking.nearest_N.push_back(std::min_element(d, d + M) - d);
  }
  return ranking;
}

Retrieval measure_retrieval(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                            const RetrievalSection& options) {
  const at::NoGradGuard no_grad;
  const codec::ImageCodec& codec = codec_of(model, tokens);
  const auto [gallery, prompts] = read_task(options, codec);

  generate::ImageOptions draw;
  draw.modality = tokens.name;
  draw.cfg = options.cfg;
  draw.sampling = {options.temperature, options.top_k, options.top_p};
  draw.seed = uint64_t(options.seed);
  Progress progress("drawing " + options.name, int64_t(prompts.size()) * tokens.item_length);
  draw.on_progress = [&](int64_t done, int64_t) { progress.update(done); };
  std::vector<generate::Prompt> texts;
  for (const auto& prompt : prompts) texts.push_back(generate::text_prompt(prompt.captions.front()));
  const auto start = std::chrono::steady_clock::now();
  const auto drawn = generate::generate_images(model, texts, draw);
  Retrieval result;
  result.seconds = seconds_since(start);
  progress.finish();

  std::vector<at::Tensor> samples, sheet;
  std::vector<int64_t> targets;
  for (size_t i = 0; i < prompts.size(); ++i) {
    samples.push_back(drawn[i].pixels_3HW);
    targets.push_back(prompts[i].picture);
    sheet.push_back(drawn[i].pixels_3HW);
    sheet.push_back(gallery.picture(prompts[i].picture));
  }
  const at::Tensor samples_N3HW = at::stack(samples), real_M3HW = gallery.stacked();
  result.candidates = gallery.size();
  result.skipped = gallery.skipped();
  result.real = rank_pictures(samples_N3HW, real_M3HW, targets);
  result.reconstructed = rank_pictures(samples_N3HW, reconstruct(codec, real_M3HW, model.device()), targets);
  for (size_t i = 0; i < prompts.size(); ++i)
    result.items.push_back({prompts[i].captions.front(), gallery.file(targets[i]),
                            gallery.file(result.real.nearest_N[i]), result.real.rank_N[i]});
  if (!options.sheet.empty())
    io::save_image(options.sheet,
                   io::contact_sheet(sheet, 2 * std::min<int64_t>(kPairsPerRow, int64_t(prompts.size()))));
  return result;
}

}  // namespace moegraft::evaluate
