#pragma once
// Training and judging the small VQ codec: its config, what a step computes, how well a codec does. The loop around the
// steps is train/codec.h.

#include <memory>
#include <string>
#include <vector>

#include "moegraft/checkpoint/config.h"
#include "moegraft/codec/pictures.h"
#include "moegraft/codec/vq.h"
#include "moegraft/train/config.h"

namespace moegraft::codec {

struct CodecSourceConfig {
  std::string path;
  int64_t repeat = 1;
  template <class V>
  void visit_fields(V& v) {
    v("path", path, config::required(config::path()),
      "Folder of PNG/JPEG files, or a manifest: JSONL, CSV, ImageFolder, WebDataset tars, Parquet or Arrow files.");
    v("repeat", repeat, config::range(1, 1e6), "How often each of its pictures comes in an epoch.");
  }
};

struct CodecDataConfig {
  std::vector<CodecSourceConfig> train;
  std::string eval;
  template <class V>
  void visit_fields(V& v) {
    v("train", train, config::required(), "Sources of pictures.");
    v("eval", eval, config::path(), "Held-out pictures, the same kinds; empty: none.");
  }
};

struct CodecTrainConfig {
  int64_t steps = 3000;
  double max_minutes = 0;
  int64_t batch_size = 64;
  train::OptimizerKind optimizer = train::OptimizerKind::adamw;
  std::vector<double> betas = {0.9, 0.95};
  double adam_epsilon = 1e-8;
  double lr = 2e-3;
  double weight_decay = 0.01;
  train::ScheduleKind schedule = train::ScheduleKind::cosine;
  int64_t warmup = 50;
  double min_lr_ratio = 0.02;
  double clip = 0;
  double warm_share = 0.05;
  double freeze_share = 0.65;
  double l1 = 1.0, mse = 1.0, gradient = 0.5, commitment = 0.25;
  double ema_decay = 0.97;
  double revive_below = 0.1;
  std::string precision = "auto";
  int64_t log_every = 10;
  template <class V>
  void visit_fields(V& v) {
    v("steps", steps, config::range(1, 1e9), "Optimizer steps.");
    v("max_minutes", max_minutes, config::range(0.0, 1e6),
      "Time budget; 0: none. The schedule then also runs with the clock, so two runs are no longer the same.");
    v("batch_size", batch_size, config::range(1, 65536), "Pictures a step.");
    v("optimizer", optimizer, config::any(), "The optimizer, as of moegraft train.");
    v("betas", betas, config::any(), "AdamW's two betas.");
    v("adam_epsilon", adam_epsilon, config::range(0.0, 1.0), "AdamW's epsilon.");
    v("lr", lr, config::range(0.0, 1.0), "AdamW's peak learning rate.");
    v("weight_decay", weight_decay, config::range(0.0, 10.0), "On weight matrices and convolutions.");
    v("schedule", schedule, config::any(), "Learning rate over the whole training; the warm-up multiplies it.");
    v("warmup", warmup, config::range(0, 1e9), "Steps of linear warm-up.");
    v("min_lr_ratio", min_lr_ratio, config::range(0.0, 1.0), "Where cosine and linear end, as a share of the peak.");
    v("clip", clip, config::range(0.0, 1e9), "Largest global gradient norm; 0: off.");
    v("warm_share", warm_share, config::range(0.0, 1.0),
      "Share of the training before the codebook starts (k-means on the encoder's outputs).");
    v("freeze_share", freeze_share, config::range(0.0, 1.0),
      "Share after which encoder and codebook rest and only the decoder learns.");
    v("l1", l1, config::range(0.0, 1e6), "Weight of the absolute error.");
    v("mse", mse, config::range(0.0, 1e6), "Weight of the squared error.");
    v("gradient", gradient, config::range(0.0, 1e6),
      "Weight of the absolute error of horizontal and vertical differences.");
    v("commitment", commitment, config::range(0.0, 1e6), "Weight that keeps the encoder near its codes.");
    v("ema_decay", ema_decay, config::range(0.0, 1.0), "Decay of the codes' running means.");
    v("revive_below", revive_below, config::range(0.0, 1e6),
      "A code whose running count per step falls below this restarts at an encoder output.");
    v("precision", precision, config::one_of({"auto", "float32", "bf16"}),
      "Type of the products while training; auto: bf16 where the processor has it.");
    v("log_every", log_every, config::range(1, 1e9), "Steps between lines of metrics.jsonl.");
  }
  void validate(const std::string& path) const { train::check_adamw(path, betas, adam_epsilon); }
};

struct CodecRunConfig {
  std::string dir;
  int64_t seed = 17;
  VqConfig codec;
  CodecDataConfig data;
  CodecTrainConfig train;
  checkpoint::CheckpointConfig checkpoint;
  template <class V>
  void visit_fields(V& v) {
    v("dir", dir, config::required(config::path()), "Folder the codec is written to.");
    v("seed", seed, config::range(0, 9e15), "Seed of weights, batches and restarts.");
    v("codec", codec, config::any(), "Architecture.");
    v("data", data, config::required(), "Pictures.");
    v("train", train, config::any(), "Training.");
    v("checkpoint", checkpoint, config::any(),
      "Checkpoints of the training, in DIR.training beside the codec's folder until the codec is whole.");
  }
  void validate(const std::string& path) const;
};

// How well a codec reproduces pictures.
struct Quality {
  int64_t pictures = 0;
  double psnr = 0;         // dB, mean over pictures
  double psnr_pooled = 0;  // dB of the mean squared error over all pictures
  double l1 = 0;
  int64_t used_codes = 0;
  double perplexity = 0;  // exp of the entropy of code use
};
Quality measure(const ImageCodec& codec, const at::Tensor& pixels_N3HW_u8, int64_t batch = 64);
double psnr(double mse);  // dB, of pixels in [0, 1]

// The running means behind the codebook (van den Oord et al., arXiv:1711.00937, appendix A.1), with restarts of dead
// codes.
class EmaCodebook {
 public:
  EmaCodebook(at::Tensor codebook_NZ, double decay, double revive_below);
  // Goes on from state(). UserError when that is of another shape than [codes, width].
  EmaCodebook(const io::TensorMap& state, int64_t codes, int64_t width, double decay, double revive_below);
  // z_MZ: encoder outputs; ids_M: the codes they took. Moves the codes; returns how many dead ones restarted at a row
  // of z_MZ drawn by (seed, step).
  int64_t update(const at::Tensor& z_MZ, const at::Tensor& ids_M, uint64_t seed, uint64_t step);
  const at::Tensor& codebook_NZ() const { return codebook_NZ_; }
  int64_t revived() const { return revived_; }  // over all updates
  io::TensorMap state() const;  // "codebook.codes", ".revived", and after an update ".counts" and ".sums"

 private:
  at::Tensor codebook_NZ_, counts_N_, sums_NZ_;
  int64_t revived_ = 0;
  double decay_, revive_below_;
};

// A codebook from encoder outputs, float32 [codes, d]: ot/kmeans.h from rows drawn by seed, far apart up to 2048 codes;
// a code without points restarts at the point furthest from its code. UserError: no points, or NaN among them.
at::Tensor fit_codebook(const at::Tensor& points_MZ, int64_t codes, int64_t rounds, uint64_t seed);

// What a step of the training computes: losses, gradients, and the codebook that follows the encoder. What moves the
// weights is train/codec.h's.
class VqObjective {
 public:
  VqObjective(const VqConfig& codec, const CodecTrainConfig& train, uint64_t seed, const at::Tensor& pixels_N3HW_u8);
  ~VqObjective();
  ParameterList parameters() const;  // encoder, then decoder: float32 leaves
  struct Report {
    double loss = 0, mse = 0;
    bool quantised = false, frozen = false;  // the phase: CodecTrainConfig's warm_share and freeze_share
  };
  // Sets the gradients of what learns in step `step`, leaves the others' as they are, and moves the codebook. done: how
  // much of the training lies behind this step, in [0, 1): it chooses the phase. Throws UserError when the loss is not
  // finite.
  Report backward(int64_t step, double done);
  io::TensorMap codebook_state() const;  // of EmaCodebook; empty before the codebook starts
  void load_codebook_state(const io::TensorMap& state);
  std::unique_ptr<VqCodec> finish();  // the codec; the objective is spent

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moegraft::codec
