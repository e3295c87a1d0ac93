#include "libtorch.h"

#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/train/codec.h"
#include "moegraft/train/schedule.h"

namespace moegraft::train {
namespace {

constexpr const char* kCodebook = "codebook.";  // what the objective adds to the optimizer's tensors begins so

model::ParameterRegistry register_parameters(const codec::ParameterList& parameters) {
  model::ParameterRegistry registry;
  for (const auto& [name, p] : parameters) registry.add({name, p, name == "decoder.position" ? "embeddings" : "base"});
  return registry;
}

// Positions do not decay, though they are a matrix.
std::map<std::string, GroupOptions> groups_of(const codec::CodecTrainConfig& train) {
  return {{"base", {train.lr, train.weight_decay}}, {"embeddings", {train.lr, 0.0}}};
}

}  // namespace

CodecTrainer::CodecTrainer(const codec::VqConfig& codec, const codec::CodecTrainConfig& train, uint64_t seed,
                           const at::Tensor& pixels_u8)
    : train_(train),
      objective_(codec, train, seed, pixels_u8),
      registry_(register_parameters(objective_.parameters())),
      optimizer_(registry_, groups_of(train),
                 {train.betas[0], train.betas[1], train.adam_epsilon, train.optimizer == OptimizerKind::adamw_8bit}) {}

CodecTrainer::Report CodecTrainer::step(int64_t step, double done) {
  registry_.zero_grad();  // of a phase that has ended too
  Report report{objective_.backward(step, done)};
  report.grad_norm = global_grad_norm(registry_);
  MOEGRAFT_CHECK(std::isfinite(report.grad_norm), "codec training: the gradient norm is not finite at step ", step,
                 "; lower train.lr (", train_.lr, ")");
  // By the share of the training that is done, which may run with the clock, and not from the warm-up's end as Schedule
  // has it.
  report.lr_factor = warmup_factor(step, train_.warmup) * decay_factor(train_.schedule, done, train_.min_lr_ratio);
  optimizer_.step(report.lr_factor, clip_factor(report.grad_norm, train_.clip));
  return report;
}

checkpoint::Parts CodecTrainer::parameters() const { return checkpoint::parameter_parts(registry_); }

checkpoint::Parts CodecTrainer::optimizer_state() const {
  checkpoint::Parts parts = optimizer_.state_parts();
  for (auto& part : checkpoint::whole(objective_.codebook_state())) parts.push_back(std::move(part));
  return parts;
}

void CodecTrainer::restore(const checkpoint::Checkpoint& from) {
  checkpoint::load_parameters(registry_, from.parameters);
  io::TensorMap codebook, moments;
  for (const auto& [name, tensor] : from.optimizer) (name.starts_with(kCodebook) ? codebook : moments)[name] = tensor;
  optimizer_.load_state(moments);
  objective_.load_codebook_state(codebook);
}

std::unique_ptr<codec::VqCodec> CodecTrainer::finish() { return objective_.finish(); }

}  // namespace moegraft::train
