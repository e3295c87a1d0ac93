#pragma once
// The `train` section of a run.

#include <span>
#include <string>
#include <vector>

#include "moegraft/config/config.h"

namespace moegraft::train {

struct OptimizerGroup {
  double lr = 1e-4, weight_decay = 0.0;
  template <class V>
  void visit_fields(V& v) {
    v("lr", lr, config::range(0.0, 10.0), "Peak learning rate.");
    v("weight_decay", weight_decay, config::range(0.0, 10.0), "Decoupled weight decay (matrices only).");
  }
};

enum class BaseWeights { frozen, full };
inline constexpr config::Named<BaseWeights> kBaseWeights[] = {
    {BaseWeights::frozen, "frozen"},
    {BaseWeights::full, "full", "they train too (only with model.init or allow_text_drift)."},
};
constexpr std::span<const config::Named<BaseWeights>> choices_of(BaseWeights) { return kBaseWeights; }

enum class OptimizerKind { adamw, adamw_8bit };
inline constexpr config::Named<OptimizerKind> kOptimizers[] = {
    {OptimizerKind::adamw, "adamw"},
    {OptimizerKind::adamw_8bit, "adamw_8bit",
     "both moments in 8 bits, two bytes per parameter instead of eight (tensors below 4096 values stay float32)."},
};
constexpr std::span<const config::Named<OptimizerKind>> choices_of(OptimizerKind) { return kOptimizers; }

enum class GradientDtype { float32, bf16 };
inline constexpr config::Named<GradientDtype> kGradientDtypes[] = {{GradientDtype::float32, "float32"},
                                                                   {GradientDtype::bf16, "bf16"}};
constexpr std::span<const config::Named<GradientDtype>> choices_of(GradientDtype) { return kGradientDtypes; }

inline void check_adamw(const std::string& path, const std::vector<double>& betas, double epsilon) {
  MOEGRAFT_CHECK_USAGE(betas.size() == 2, path, ".betas must have two values, got ", betas);
  for (const double beta : betas)
    MOEGRAFT_CHECK_USAGE(beta >= 0 && beta < 1, path, ".betas must be in [0, 1), got ", betas);
  MOEGRAFT_CHECK_USAGE(epsilon > 0, path, ".adam_epsilon must be above 0, got ", epsilon);
}

enum class ScheduleKind { cosine, linear, constant };
inline constexpr config::Named<ScheduleKind> kSchedules[] = {
    {ScheduleKind::cosine, "cosine"}, {ScheduleKind::linear, "linear"}, {ScheduleKind::constant, "constant"}};
constexpr std::span<const config::Named<ScheduleKind>> choices_of(ScheduleKind) { return kSchedules; }

struct TrainConfig {
  int64_t steps = 1000;
  double max_minutes = 0;  // 0: no limit
  OptimizerKind optimizer = OptimizerKind::adamw;
  GradientDtype gradients = GradientDtype::float32;
  std::vector<double> betas = {0.9, 0.95};
  double adam_epsilon = 1e-8;
  OptimizerGroup lora{1e-4, 0.0}, embeddings{1e-3, 0.0}, base{3e-3, 0.1};
  ScheduleKind schedule = ScheduleKind::cosine;
  int64_t warmup = 50;
  double min_lr_ratio = 0.05;
  double clip = 1.0;
  int64_t accumulation = 1;
  double memory_budget_gib = 0;  // 0: a GPU's free memory; on the CPU no limit
  int64_t prefix_cache_mib = 0;  // 0: none
  BaseWeights base_weights = BaseWeights::frozen;
  int64_t log_every = 10;
  int64_t eval_every = 0;
  int64_t eval_tokens = 16384;
  int64_t early_stopping_patience = 0;  // 0: off
  int64_t sample_every = 0;
  std::vector<std::string> sample_prompts;
  bool allow_text_drift = false;
  bool strict = false;
  template <class V>
  void visit_fields(V& v) {
    v("steps", steps, config::range(1, 1e12), "Optimizer steps.");
    v("max_minutes", max_minutes, config::range(0.0, 1e9),
      "Stop cleanly after this time; 0: no limit. The schedule still spans `steps`.");
    v("optimizer", optimizer, config::any(), "The optimizer of everything that trains.");
    v("gradients", gradients, config::any(),
      "What gradients are kept in from micro-batch to micro-batch. bf16: half the memory, each micro-batch's sum "
      "rounded once (by up to 2^-8 of it); sums over processes, norm and update stay float32.");
    v("betas", betas, config::any(), "AdamW's two betas.");
    v("adam_epsilon", adam_epsilon, config::range(0.0, 1.0), "AdamW's epsilon.");
    v("lora", lora, config::any(), "Group of the low-rank factors.");
    v("embeddings", embeddings, config::any(), "Group of the new embedding and head rows.");
    v("base", base, config::any(), "Group of the base's own weights (training from scratch).");
    v("schedule", schedule, config::any(), "Learning rate after warm-up.");
    v("warmup", warmup, config::range(0, 1e12), "Steps of linear warm-up.");
    v("min_lr_ratio", min_lr_ratio, config::range(0.0, 1.0), "Where cosine and linear end, as a share of the peak.");
    v("clip", clip, config::range(0.0, 1e9), "Largest global gradient norm; 0: off.");
    v("accumulation", accumulation, config::range(1, 1e6),
      "Micro-batches per optimizer step: its sequences are dealt to them, so that each holds about tokens_per_step / "
      "accumulation tokens.");
    v("memory_budget_gib", memory_budget_gib, config::range(0.0, 1e6),
      "Memory that a step may take (the process on the CPU, the device on a GPU); as few layers as it takes are "
      "computed again in the backward pass. 0: 0.94 of what the GPU has free at the start; on the CPU no limit.");
    v("prefix_cache_mib", prefix_cache_mib, config::range(0, 1 << 24),
      "Room for what the frozen base makes of captions, which come back every epoch (keys and values of every layer); "
      "full, it keeps what came first. 0: none.");
    v("base_weights", base_weights, config::any(), "What happens to the base's own weights.");
    v("log_every", log_every, config::range(1, 1e9), "Steps between lines of metrics.jsonl.");
    v("eval_every", eval_every, config::range(0, 1e12), "Steps between evaluations; 0: only at the end.");
    v("eval_tokens", eval_tokens, config::range(1, 1e12), "Tokens per evaluation.");
    v("early_stopping_patience", early_stopping_patience, config::range(0, 1e9),
      "End the run, saved, after so many evaluations in a row (eval_every) without a lower loss on data.eval; 0: off. "
      "Read the best with --checkpoint best.");
    v("sample_every", sample_every, config::range(0, 1e12), "Steps between sample pictures; 0: only at the end.");
    v("sample_prompts", sample_prompts, config::any(), "Prompts of the sample pictures.");
    v("allow_text_drift", allow_text_drift, config::any(), "Permit what changes text logits.");
    v("strict", strict, config::any(),
      "End the run, saved, at the first warning that it learns nothing (no labels of the new modality, a zero "
      "gradient, a constant loss, ...).");
  }
  void validate(const std::string& path) const {
    check_adamw(path, betas, adam_epsilon);
    // bf16 has 8 bits: of more addends the average one would be near what rounding drops.
    MOEGRAFT_CHECK_USAGE(gradients == GradientDtype::float32 || accumulation <= 128, path,
                         ".gradients: bf16 adds up at most 128 micro-batches, ", path, ".accumulation is ",
                         accumulation, ": use float32, or larger micro-batches");
    MOEGRAFT_CHECK_USAGE(early_stopping_patience == 0 || eval_every > 0, path,
                         ".early_stopping_patience counts evaluations: set ", path, ".eval_every too");
    MOEGRAFT_CHECK_USAGE(sample_every == 0 || !sample_prompts.empty(), path, ".sample_every is ", sample_every, " but ",
                         path, ".sample_prompts is empty");
  }
};

}  // namespace moegraft::train
