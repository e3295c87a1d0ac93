// What one step of codec training after the other computes.
#include <torch/csrc/autograd/autograd.h>

#include "libtorch.h"

#include <algorithm>
#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/rng.h"
#include "moegraft/codec/train.h"
#include "moegraft/kernels/cpu.h"
#include "shards.h"

namespace moegraft::codec {
namespace {

constexpr int64_t kPointsPerCode = 32;  // encoder outputs that the k-means start looks at, per code
constexpr int64_t kKmeansRounds = 12;
// Pictures of a shard: as many as leave no thread without one, but products too small cost more than threads gain, and
// too large ones leave the cache.
constexpr int64_t kSmallestShard = 8, kLargestShard = 32;

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
  std::vector<at::Tensor> parts(size_t((pixels_u8.size(0) + batch - 1) / batch));
  run_shards(int64_t(parts.size()), [&](int64_t i) {
    const at::NoGradGuard no_grad;
    parts[size_t(i)] = f(to_float(pixels_u8.narrow(0, i * batch, std::min(batch, pixels_u8.size(0) - i * batch))));
  });
  return at::cat(parts);
}

at::Tensor start_codebook(const VqCodec& model, const at::Tensor& pixels_u8, uint64_t seed) {
  const int64_t length = model.item_length(), codes = model.codebook_size();
  const int64_t wanted = std::min(pixels_u8.size(0), (kPointsPerCode * codes + length - 1) / length);
  auto picks = Rng(seed, "codec.kmeans.pictures").permutation(pixels_u8.size(0));
  picks.resize(size_t(wanted));
  const auto z = in_batches(pixels_u8.index_select(0, at::tensor(picks, at::kLong)), 64,
                            [&](const at::Tensor& x) { return model.embed(x); });
  return fit_codebook(z.flatten(0, 1), codes, kKmeansRounds, seed);
}

// The error of a reconstruction, as means over its pictures.
struct Loss {
  at::Tensor total, mse;
};
Loss reconstruction_loss(const CodecTrainConfig& train, const at::Tensor& error_B3HW) {
  const auto mse = error_B3HW.square().mean();
  auto total = mse * train.mse + error_B3HW.abs().mean() * train.l1;
  if (train.gradient > 0) {
    const auto dx = error_B3HW.slice(3, 1) - error_B3HW.slice(3, 0, -1),
               dy = error_B3HW.slice(2, 1) - error_B3HW.slice(2, 0, -1);
    total = total + (dx.abs().mean() + dy.abs().mean()) * (0.5 * train.gradient);
  }
  return {total, mse};
}

// What a shard leaves behind; sums over shards are taken in their order, whoever computed them.
struct Shard {
  double loss = 0, mse = 0;
  at::Tensor z_MZ, ids_M;
  std::vector<at::Tensor> gradients;
};

}  // namespace

struct VqObjective::State {
  CodecTrainConfig train;
  uint64_t seed;
  at::Tensor pixels_u8;
  std::unique_ptr<VqCodec> model;
  ParameterList encoder, decoder;
  BatchOrder order;
  at::ScalarType compute;
  std::unique_ptr<EmaCodebook> ema;
  at::Tensor frozen_ids_NL;

  Shard run(const at::Tensor& picks, const std::vector<at::Tensor>& leaves, double weight) const;
};

VqObjective::VqObjective(const VqConfig& config, const CodecTrainConfig& train, uint64_t seed,
                         const at::Tensor& pixels_u8) {
  MOEGRAFT_CHECK(pixels_u8.dim() == 4 && pixels_u8.size(0) > 0, "codec training needs at least one picture");
  const bool bf16 =
      train.precision == "bf16" || (train.precision == "auto" && kernels::cpu_kernels().bfloat16_speed > 1);
  state_.reset(new State{train,
                         seed,
                         pixels_u8,
                         std::make_unique<VqCodec>(config, seed),
                         {},
                         {},
                         BatchOrder(pixels_u8.size(0), train.batch_size, seed),
                         bf16 ? at::kBFloat16 : at::kFloat,
                         nullptr,
                         {}});
  state_->encoder = state_->model->encoder_parameters(), state_->decoder = state_->model->decoder_parameters();
  for (const auto& [name, p] : parameters()) p.requires_grad_(true);
}

VqObjective::~VqObjective() = default;

ParameterList VqObjective::parameters() const {
  ParameterList all = state_->encoder;
  all.insert(all.end(), state_->decoder.begin(), state_->decoder.end());
  return all;
}

io::TensorMap VqObjective::codebook_state() const { return state_->ema ? state_->ema->state() : io::TensorMap(); }

void VqObjective::load_codebook_state(const io::TensorMap& state) {
  if (state.empty()) return;
  const VqConfig& c = state_->model->config();
  state_->ema = std::make_unique<EmaCodebook>(state, c.codebook_size, c.code_width, state_->train.ema_decay,
                                              state_->train.revive_below);
  state_->model->set_codebook(state_->ema->codebook_NZ());
}

// Forward and backward over some pictures. weight: their share of the batch.
Shard VqObjective::State::run(const at::Tensor& picks, const std::vector<at::Tensor>& leaves, double weight) const {
  const at::AutoGradMode grad(true);
  Shard shard;
  const auto target = to_float(pixels_u8.index_select(0, picks));
  at::Tensor commitment, decoder_in;
  if (frozen_ids_NL.defined()) {
    decoder_in = model->codebook_NZ().index({frozen_ids_NL.index_select(0, picks)});
  } else {
    const auto z = decoder_in = model->embed(target);
    if (ema) {
      const auto ids = model->nearest(z);
      const auto codes = model->codebook_NZ().index({ids});
      commitment = (z - codes).square().mean();
      decoder_in = z + (codes - z).detach();  // straight-through: the decoder's gradient passes to z unchanged
      shard.z_MZ = z.detach().flatten(0, 1), shard.ids_M = ids.flatten();
    }
  }
  const auto [error, mse] = reconstruction_loss(train, model->render(decoder_in) - target);
  auto loss = error;
  if (commitment.defined()) loss = loss + commitment * train.commitment;
  shard.gradients = torch::autograd::grad({loss * weight}, leaves);
  shard.loss = loss.item<double>() * weight, shard.mse = mse.item<double>() * weight;
  return shard;
}

VqObjective::Report VqObjective::backward(int64_t step, double done) {
  State& s = *state_;
  const CodecTrainConfig& train = s.train;
  const bool quantised = done >= train.warm_share, frozen = done >= train.freeze_share;
  s.model->set_compute(at::kFloat);  // the k-means start and the frozen ids see what encode will see
  if (quantised && !s.ema) {
    s.model->set_codebook(start_codebook(*s.model, s.pixels_u8, s.seed));
    s.ema = std::make_unique<EmaCodebook>(s.model->codebook_NZ(), train.ema_decay, train.revive_below);
  }
  if (frozen && !s.frozen_ids_NL.defined())
    s.frozen_ids_NL = in_batches(s.pixels_u8, 64, [&](const at::Tensor& x) { return s.model->encode(x); });
  s.model->set_compute(s.compute);

  std::vector<at::Tensor> masters, leaves;
  for (const auto* list : {&s.encoder, &s.decoder}) {
    if (frozen && list == &s.encoder) continue;
    for (const auto& [name, p] : *list) masters.push_back(p), leaves.push_back(s.model->working(name));
  }
  const auto picks = s.order.indices(step);
  const int64_t threads = at::get_num_threads(),
                size = std::clamp((train.batch_size + threads - 1) / threads, kSmallestShard, kLargestShard);
  const int64_t count = (train.batch_size + size - 1) / size;
  std::vector<Shard> shards(static_cast<size_t>(count));
  run_shards(count, [&](int64_t i) {
    const int64_t first = i * size, pictures = std::min(size, train.batch_size - first);
    shards[size_t(i)] = s.run(picks.narrow(0, first, pictures), leaves, double(pictures) / double(train.batch_size));
  });

  Report report{0, 0, quantised, frozen};
  for (const auto& shard : shards) report.loss += shard.loss, report.mse += shard.mse;
  MOEGRAFT_CHECK(std::isfinite(report.loss), "codec training: the loss is not finite at step ", step,
                 "; lower train.lr (", train.lr, ")");
  run_shards(int64_t(masters.size()), [&](int64_t p) {
    const at::NoGradGuard no_grad;
    auto sum = shards[0]
                   .gradients[size_t(p)]
                   .to(at::kFloat)
                   .contiguous();  // a convolution's comes channels-last, and the optimizer reads memory
    for (size_t i = 1; i < shards.size(); ++i) sum.add_(shards[i].gradients[size_t(p)]);
    masters[size_t(p)].mutable_grad() = sum;
  });
  if (quantised && !frozen) {
    std::vector<at::Tensor> z, ids;
    for (const auto& shard : shards) z.push_back(shard.z_MZ), ids.push_back(shard.ids_M);
    s.ema->update(at::cat(z), at::cat(ids), s.seed, uint64_t(step));
    s.model->set_codebook(s.ema->codebook_NZ());
  }
  return report;
}

std::unique_ptr<VqCodec> VqObjective::finish() {
  State& s = *state_;
  s.model->set_compute(at::kFloat);
  if (!s.ema)
    s.model->set_codebook(
        start_codebook(*s.model, s.pixels_u8, s.seed));  // stopped before the codebook started: still a valid codec
  for (const auto& [name, p] : parameters()) p.requires_grad_(false);
  log::debug("codec: ", s.ema ? s.ema->revived() : 0, " codes restarted");
  return std::move(s.model);
}

}  // namespace moegraft::codec
