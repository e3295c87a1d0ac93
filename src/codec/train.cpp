#include "moegraft/codec/train.h"

#include "libtorch.h"

#include <chrono>
#include <cmath>
#include <cstdio>

#include "moegraft/base/check.h"
#include "moegraft/base/progress.h"

namespace moegraft::codec {
namespace {

double psnr_of(double mse) { return -10 * std::log10(std::max(mse, 1e-10)); }

}  // namespace

void CodecRunConfig::validate(const std::string& path) const {
  const std::string prefix = path.empty() ? "" : path + ".";
  MOEGRAFT_CHECK_USAGE(!dir.empty(), prefix, "dir must not be empty");
  MOEGRAFT_CHECK_USAGE(!data.train.empty(), prefix,
                       "data.train must list at least one source: - { path: pictures.jsonl }");
  MOEGRAFT_CHECK_USAGE(train.warm_share <= train.freeze_share, prefix, "train.warm_share (", train.warm_share,
                       ") must not exceed train.freeze_share (", train.freeze_share, ")");
}

std::unique_ptr<VqCodec> train_vq(const VqConfig& config, const CodecTrainConfig& train, uint64_t seed,
                                  const at::Tensor& pixels_u8, std::vector<double>* losses) {
  VqTrainer trainer(config, train, seed, pixels_u8);
  Progress progress("codec", train.steps);
  const auto start = std::chrono::steady_clock::now();
  double smooth_mse = 0;
  for (int64_t step = 0; step < train.steps; ++step) {
    double done = double(step) / double(train.steps);
    if (train.max_minutes > 0) {
      const double minutes = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 60;
      if (minutes >= train.max_minutes) break;
      done = std::max(done, minutes / train.max_minutes);
    }
    const auto report = trainer.step(step, done);
    if (losses) losses->push_back(report.loss);
    smooth_mse = step == 0 ? report.mse : 0.98 * smooth_mse + 0.02 * report.mse;
    char status[96];
    std::snprintf(status, sizeof status, "loss %.4f · PSNR %.2f dB%s", report.loss, psnr_of(smooth_mse),
                  report.frozen      ? " · decoder only"
                  : report.quantised ? ""
                                     : " · no codebook yet");
    progress.update(step + 1, status);
  }
  progress.finish();
  return trainer.finish();
}

Quality measure(const ImageCodec& codec, const at::Tensor& pixels_u8, int64_t batch) {
  at::NoGradGuard no_grad;
  Quality q;
  double total_mse = 0, total_l1 = 0, total_psnr = 0;
  at::Tensor counts = at::zeros({codec.num_codes()}, at::kDouble);
  for (int64_t i = 0; i < pixels_u8.size(0); i += batch) {
    const auto x = to_float(pixels_u8.narrow(0, i, std::min(batch, pixels_u8.size(0) - i)));
    const auto ids = codec.encode(x);
    const auto error = codec.decode(ids).cpu() - x;
    const auto mse_B = error.square().flatten(1).mean(1).to(at::kDouble);
    total_psnr += (mse_B.clamp_min(1e-10).log10() * -10).sum().item<double>();
    total_mse += mse_B.sum().item<double>();
    total_l1 += error.abs().flatten(1).mean(1).sum().item<double>();
    counts += at::bincount(ids.flatten().cpu(), {}, codec.num_codes()).to(at::kDouble);
    q.pictures += x.size(0);
  }
  if (q.pictures == 0) return q;
  q.psnr = total_psnr / double(q.pictures);
  q.psnr_pooled = psnr_of(total_mse / double(q.pictures));
  q.l1 = total_l1 / double(q.pictures);
  q.used_codes = (counts > 0).sum().item<int64_t>();
  const auto p = counts / counts.sum();
  q.perplexity = std::exp(-(p * p.clamp_min(1e-300).log()).sum().item<double>());
  return q;
}

}  // namespace moegraft::codec
