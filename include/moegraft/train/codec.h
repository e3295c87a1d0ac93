#pragma once
// The training of a codec (codec/train.h): optimizer, schedule, checkpoints and records of moegraft train around the
// codec's objective.

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/codec/train.h"
#include "moegraft/model/registry.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::train {

// Step by step: CodecRun takes them to the end, benchmarks some of them.
class CodecTrainer {
 public:
  CodecTrainer(const codec::VqConfig& codec, const codec::CodecTrainConfig& train, uint64_t seed,
               const at::Tensor& pixels_N3HW_u8);
  CodecTrainer(const CodecTrainer&) = delete;
  struct Report : codec::VqObjective::Report {
    double grad_norm = 0;  // before clipping
    double lr_factor = 0;  // the learning rate's share of train.lr
  };
  // done: how much of the training lies behind this step, in [0, 1): it chooses the phase and the learning rate.
  // UserError when loss or gradient is not finite.
  Report step(int64_t step, double done);

  checkpoint::Parts parameters() const;              // the codec's weights (views)
  checkpoint::Parts optimizer_state() const;         // moments, counts, and the codebook with its running means (views)
  void restore(const checkpoint::Checkpoint& from);  // UserError names a tensor that is missing, left over or misshapen
  std::unique_ptr<codec::VqCodec> finish();          // the codec; the trainer is spent

 private:
  codec::CodecTrainConfig train_;
  codec::VqObjective objective_;
  model::ParameterRegistry registry_;
  AdamW optimizer_;
};

// 16 hex digits of the pictures' content and order.
std::string fingerprint_pictures(const at::Tensor& pixels_u8);

// "train.lr (was 0.002, is 0.001)" for every key that differs and decides what the codec becomes. The codec's folder,
// when it is saved and noted, and data may differ: pictures are compared by their content.
std::vector<std::string> codec_changes(const codec::CodecRunConfig& before, const codec::CodecRunConfig& after);

struct CodecOutcome {
  std::unique_ptr<codec::VqCodec> codec;  // null: stopped by a signal, with everything saved
  int64_t step = 0;
  double seconds = 0;  // of training, over all sessions
};

// A training lives beside the codec's folder until the codec is whole: config.dir + ".training" holds codec.yaml
// (resolved), metrics.jsonl (run/records.h), checkpoints/ and a lock.
std::filesystem::path codec_training_folder(const std::string& dir);
// Removes what is left of one; nothing where there is none. UserError when a process is at work there.
void remove_codec_training(const std::string& dir);

// One training. Owns its folder until destroyed: one process at a time.
class CodecRun {
 public:
  // resume: "none" (a new training; UsageError when one that has saved something is there) or "auto" (goes on with
  // that, else begins). One of another config or of other pictures cannot go on: UsageError says what differs.
  // overwrite: what is refused above is removed instead.
  CodecRun(const codec::CodecRunConfig& config, const at::Tensor& pixels_N3HW_u8, const std::string& resume = "none",
           bool overwrite = false);
  ~CodecRun();
  // To train.steps or train.max_minutes; everything is saved on return. Without max_minutes the codec is a function of
  // (config, pixels, machine type, thread count) alone, however often its training was interrupted. UserError when loss
  // or gradient is not finite.
  CodecOutcome train();
  const std::filesystem::path& folder() const;
  void remove();  // the folder, once the codec is where it belongs

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moegraft::train
