#pragma once
// AdamW over the parameter registry (Loshchilov and Hutter, arXiv:1711.05101), and clipping of the global gradient norm.

#include <torch/types.h>

#include <map>
#include <string>
#include <vector>

#include "moegraft/checkpoint/parameters.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/registry.h"

namespace moegraft::train {

// Root of the sum of squares over every defined gradient, each parameter once. Accumulated in double over fixed chunks on the CPU,
// so the value depends neither on the number of threads nor on scheduling. 0 without any gradient; NaN or Inf pass through.
double global_grad_norm(const model::ParameterRegistry& registry);

// Scales all gradients by max_norm / norm where norm > max_norm > 0 (max_norm 0: off). Returns the norm before clipping.
// A norm that is not finite leaves the gradients as they are: the caller stops.
double clip_grad_norm(model::ParameterRegistry& registry, double max_norm);

struct GroupOptions {
  double lr = 1e-4;            // peak; step() multiplies it by the schedule's factor
  double weight_decay = 0.0;   // decoupled; tensors of two or more dimensions only
};
struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
};

class AdamW {
 public:
  // The registry outlives the optimizer and is complete. Moments are float32 beside each master. UsageError: a group of the registry without options.
  AdamW(model::ParameterRegistry& registry, std::map<std::string, GroupOptions> groups, AdamWOptions options = {});

  // One update from the gradients present. A parameter without a gradient keeps its value, its moments and its own step count
  // (so a batch without image tokens trains nothing). Returns the number of parameters updated.
  int64_t step(double lr_factor);
  int64_t steps() const { return steps_; }  // calls of step(), those without any gradient included

  // "<name>.exp_avg", "<name>.exp_avg_sq", "<name>.step" for each parameter, and "steps". Views: valid until the next step().
  io::TensorMap state() const;
  // Copies. UserError names a tensor that is missing, left over or misshapen.
  void load_state(const io::TensorMap& state);

 private:
  struct Slot {
    at::Tensor exp_avg, exp_avg_sq, step;  // step: float32 scalar, as the fused kernel wants it
  };
  model::ParameterRegistry& registry_;
  std::map<std::string, GroupOptions> groups_;
  AdamWOptions options_;
  std::vector<Slot> slots_;  // in the registry's order
  int64_t steps_ = 0;
};

}  // namespace moegraft::train
