#include "moegraft/codec/train.h"

#include "libtorch.h"

#include <chrono>
#include <cmath>
#include <cstdio>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/rng.h"

namespace moegraft::codec {
namespace {

constexpr int64_t kPointsPerCode = 32;  // encoder outputs that the k-means start looks at, per code
constexpr int64_t kKmeansRounds = 12;

// AdamW over float32 leaves, all in one fused call.
class AdamW {
 public:
  void add(const ParameterList& parameters, double weight_decay) {
    for (const auto& [name, p] : parameters) {
      // Norms, biases and positions do not decay.
      Group& group = groups_[p.dim() > 1 && name != "decoder.position" ? 0 : 1];
      group.decay = &group == &groups_[0] ? weight_decay : 0;
      group.parameters.push_back(p);
      group.first.push_back(at::zeros_like(p));
      group.second.push_back(at::zeros_like(p));
      group.steps.push_back(at::zeros({}, at::kFloat));
    }
  }
  void step(double lr) {
    at::NoGradGuard no_grad;
    for (auto& g : groups_) {
      std::vector<at::Tensor> parameters, gradients, first, second, steps;
      for (size_t i = 0; i < g.parameters.size(); ++i) {
        if (!g.parameters[i].grad().defined()) continue;
        g.steps[i].add_(1);
        parameters.push_back(g.parameters[i]), gradients.push_back(g.parameters[i].grad());
        first.push_back(g.first[i]), second.push_back(g.second[i]), steps.push_back(g.steps[i]);
      }
      if (parameters.empty()) continue;
      at::_fused_adamw_(parameters, gradients, first, second, {}, steps, lr, 0.9, 0.95, g.decay, 1e-8, /*amsgrad=*/false, /*maximize=*/false, {}, {});
      for (auto& p : parameters) p.mutable_grad().reset();
    }
  }

 private:
  struct Group {
    std::vector<at::Tensor> parameters, first, second, steps;
    double decay = 0;
  };
  Group groups_[2];
};

// Pictures of step `step`: epochs of fresh permutations laid end to end, so nothing depends on what was drawn before.
class BatchOrder {
 public:
  BatchOrder(int64_t count, int64_t batch, uint64_t seed) : count_(count), batch_(batch), seed_(seed) {}
  at::Tensor indices(int64_t step) {
    std::vector<int64_t> picks(static_cast<size_t>(batch_));
    for (int64_t i = 0; i < batch_; ++i) {
      const int64_t position = step * batch_ + i, epoch = position / count_;
      if (epoch != epoch_) {
        order_ = Rng(seed_, "codec.batch", uint64_t(epoch)).permutation(count_);
        epoch_ = epoch;
      }
      picks[size_t(i)] = order_[size_t(position % count_)];
    }
    return at::tensor(picks, at::kLong);
  }

 private:
  int64_t count_, batch_, epoch_ = -1;
  uint64_t seed_;
  std::vector<int64_t> order_;
};

template <class F>
at::Tensor in_batches(const at::Tensor& pixels_u8, int64_t batch, F&& f) {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < pixels_u8.size(0); i += batch) parts.push_back(f(to_float(pixels_u8.narrow(0, i, std::min(batch, pixels_u8.size(0) - i)))));
  return at::cat(parts);
}

at::Tensor start_codebook(const VqCodec& model, const at::Tensor& pixels_u8, uint64_t seed) {
  const int64_t length = model.grid() * model.grid(), codes = model.codebook_size();
  const int64_t wanted = std::min(pixels_u8.size(0), (kPointsPerCode * codes + length - 1) / length);
  auto picks = Rng(seed, "codec.kmeans.pictures").permutation(pixels_u8.size(0));
  picks.resize(size_t(wanted));
  const auto z = in_batches(pixels_u8.index_select(0, at::tensor(picks, at::kLong)), 64, [&](const at::Tensor& x) { return model.embed(x); });
  return kmeans(z.flatten(0, 1), codes, kKmeansRounds, seed);
}

bool processor_has_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

double psnr_of(double mse) { return -10 * std::log10(std::max(mse, 1e-10)); }

}  // namespace

void CodecRunConfig::validate(const std::string& path) const {
  const std::string prefix = path.empty() ? "" : path + ".";
  MOEGRAFT_CHECK_USAGE(!dir.empty(), prefix, "dir must not be empty");
  MOEGRAFT_CHECK_USAGE(!data.train.empty(), prefix, "data.train must list at least one source: - { path: pictures.jsonl }");
  MOEGRAFT_CHECK_USAGE(train.warm_share <= train.freeze_share, prefix, "train.warm_share (", train.warm_share, ") must not exceed train.freeze_share (",
                       train.freeze_share, ")");
}

std::unique_ptr<VqCodec> train_vq(const VqConfig& config, const CodecTrainConfig& train, uint64_t seed, const at::Tensor& pixels_u8, std::vector<double>* losses) {
  MOEGRAFT_CHECK(pixels_u8.dim() == 4 && pixels_u8.size(0) > 0, "codec training needs at least one picture");
  auto model = std::make_unique<VqCodec>(config, seed);
  AdamW optimizer;
  for (const auto& list : {model->encoder_parameters(), model->decoder_parameters()}) {
    for (const auto& [name, p] : list) p.requires_grad_(true);
    optimizer.add(list, train.weight_decay);
  }
  const bool bf16 = train.precision == "bf16" || (train.precision == "auto" && processor_has_bf16());
  BatchOrder order(pixels_u8.size(0), train.batch_size, seed);
  std::unique_ptr<EmaCodebook> ema;
  at::Tensor frozen_ids_NL;
  Progress progress("codec", train.steps);
  const auto start = std::chrono::steady_clock::now();
  double smooth_mse = 0;
  int64_t revived = 0;
  for (int64_t step = 0; step < train.steps; ++step) {
    double done = double(step) / double(train.steps);
    if (train.max_minutes > 0) {
      const double minutes = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 60;
      if (minutes >= train.max_minutes) break;
      done = std::max(done, minutes / train.max_minutes);
    }
    model->set_compute(at::kFloat);  // the k-means start and the frozen ids see what encode will see
    const bool quantised = done >= train.warm_share, frozen = done >= train.freeze_share;
    if (quantised && !ema) {
      model->set_codebook(start_codebook(*model, pixels_u8, seed));
      ema = std::make_unique<EmaCodebook>(model->codebook_NZ(), train.ema_decay, train.revive_below);
    }
    if (frozen && !frozen_ids_NL.defined()) frozen_ids_NL = in_batches(pixels_u8, 64, [&](const at::Tensor& x) { return model->encode(x); });

    model->set_compute(bf16 ? at::kBFloat16 : at::kFloat);
    const auto picks = order.indices(step);
    const auto target = to_float(pixels_u8.index_select(0, picks));
    at::Tensor z, ids, commitment, decoder_in;
    if (frozen) {
      decoder_in = model->codebook_NZ().index({frozen_ids_NL.index_select(0, picks)});
    } else {
      z = model->embed(target);
      decoder_in = z;
      if (quantised) {
        ids = model->nearest(z);
        const auto codes = model->codebook_NZ().index({ids});
        commitment = (z - codes).square().mean();
        decoder_in = z + (codes - z).detach();  // straight-through: the decoder's gradient passes to z unchanged
      }
    }
    const auto error = model->render(decoder_in) - target;
    const auto mse = error.square().mean();
    auto loss = mse * train.mse + error.abs().mean() * train.l1;
    if (train.gradient > 0) {
      const auto dx = error.slice(3, 1) - error.slice(3, 0, -1), dy = error.slice(2, 1) - error.slice(2, 0, -1);
      loss = loss + (dx.abs().mean() + dy.abs().mean()) * (0.5 * train.gradient);
    }
    if (commitment.defined()) loss = loss + commitment * train.commitment;
    loss.backward();
    const double value = loss.item<double>(), mse_value = mse.item<double>();
    MOEGRAFT_CHECK(std::isfinite(value), "codec training: the loss is not finite at step ", step, "; lower train.lr (", train.lr, ")");
    if (losses) losses->push_back(value);

    const double warm = step < train.warmup ? double(step + 1) / double(train.warmup) : 1.0;
    const double cosine = train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + std::cos(M_PI * std::min(done, 1.0)));
    optimizer.step(train.lr * warm * cosine);
    if (ids.defined()) {
      revived += ema->update(z.flatten(0, 1), ids.flatten(), seed, uint64_t(step));
      model->set_codebook(ema->codebook_NZ());
    }
    smooth_mse = step == 0 ? mse_value : 0.98 * smooth_mse + 0.02 * mse_value;
    char status[96];
    std::snprintf(status, sizeof status, "loss %.4f · PSNR %.2f dB%s", value, psnr_of(smooth_mse), frozen ? " · decoder only" : quantised ? "" : " · no codebook yet");
    progress.update(step + 1, status);
  }
  progress.finish();
  model->set_compute(at::kFloat);
  if (!ema) model->set_codebook(start_codebook(*model, pixels_u8, seed));  // stopped before the codebook started: still a valid codec
  for (const auto& list : {model->encoder_parameters(), model->decoder_parameters()})
    for (const auto& [name, p] : list) p.requires_grad_(false);
  log::debug("codec: ", revived, " codes restarted");
  return model;
}

Quality measure(const ImageCodec& codec, const at::Tensor& pixels_u8, int64_t batch) {
  at::NoGradGuard no_grad;
  Quality q;
  double total_mse = 0, total_l1 = 0, total_psnr = 0;
  at::Tensor counts = at::zeros({codec.codebook_size()}, at::kDouble);
  for (int64_t i = 0; i < pixels_u8.size(0); i += batch) {
    const auto x = to_float(pixels_u8.narrow(0, i, std::min(batch, pixels_u8.size(0) - i)));
    const auto ids = codec.encode(x);
    const auto error = codec.decode(ids).cpu() - x;
    const auto mse_B = error.square().flatten(1).mean(1).to(at::kDouble);
    total_psnr += (mse_B.clamp_min(1e-10).log10() * -10).sum().item<double>();
    total_mse += mse_B.sum().item<double>();
    total_l1 += error.abs().flatten(1).mean(1).sum().item<double>();
    counts += at::bincount(ids.flatten().cpu(), {}, codec.codebook_size()).to(at::kDouble);
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
