#pragma once
// AdamW over the parameter registry (Loshchilov and Hutter, arXiv:1711.05101), with moments in float32 or 8 bits, and
// the global gradient norm.

#include <torch/types.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "moegraft/checkpoint/parameters.h"
#include "moegraft/checkpoint/parts.h"
#include "moegraft/distributed/communicator.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/kernels/optimizer.h"
#include "moegraft/model/registry.h"

namespace moegraft::train {

// Root of the sum of squares over every defined gradient, each parameter once. Accumulated in double over fixed chunks
// on the CPU, so the value depends neither on the number of threads nor on scheduling. 0 without any gradient; NaN or
// Inf pass through. experts: the group over which expert parameters are spread; their squares are then added over it in
// rank order (collective), the same bits on every rank.
double global_grad_norm(const model::ParameterRegistry& registry, distributed::Communicator* experts = nullptr);
// The same in two halves, so that a step waits for the device once. First: the squares of what is on a device, as
// float64 [2] there (of parameters that are everywhere, and of those spread over `experts`), a handful of launches and
// no wait; undefined when every gradient is on the host. Second: with what the host read of them ({} if undefined).
at::Tensor queue_grad_squares(const model::ParameterRegistry& registry,
                              const distributed::Communicator* experts = nullptr);
double global_grad_norm(const model::ParameterRegistry& registry, distributed::Communicator* experts,
                        const std::array<double, 2>& from_device);
// Of all elements of all tensors of one device, a float64 scalar there: accumulated in double without a copy in double,
// in launches that do not count the tensors.
at::Tensor sum_of_squares(const std::vector<at::Tensor>& tensors);

// What the gradients are to be multiplied by: max_norm / norm where norm > max_norm > 0, else 1 (max_norm 0: off; a
// norm that is not finite: the caller stops).
double clip_factor(double norm, double max_norm);

struct GroupOptions {
  double lr = 1e-4;           // peak; step() multiplies it by the schedule's factor
  double weight_decay = 0.0;  // decoupled; tensors of two or more dimensions only
};
struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
  bool moments_8bit = false;  // kernels/optimizer.h: two bytes per parameter instead of eight
};
// Smaller tensors keep float32 moments: little to gain, and the smallest tensors (norms, biases) are the most
// sensitive.
constexpr int64_t kSmallest8bit = 4096;
// Whether a parameter's moments are in 8 bits where they are wanted. Depends on the whole tensor, never on the slice
// that is here. Those of experts only where an expert is a multiple of the quantisation's blocks: then a slice's codes
// and scales are slices of the whole tensor's, under every layout.
bool suits_8bit(const model::Parameter& parameter);

class AdamW {
 public:
  // The registry outlives the optimizer and is complete. UsageError: a group of the registry without options.
  // owned, in the registry's order: the parameters that this process updates (parallel/updates.h brings the others'
  // values); empty: all. Only they have state.
  AdamW(model::ParameterRegistry& registry, std::map<std::string, GroupOptions> groups, AdamWOptions options = {},
        std::vector<bool> owned = {});

  // One update from the gradients present, each multiplied by grad_factor (the gradients' own values are undefined
  // afterwards unless it is 1). A parameter without a gradient keeps its value, its moments and its own step count (so
  // a batch without image tokens trains nothing). Returns the number of parameters updated.
  int64_t step(double lr_factor, double grad_factor = 1.0);
  int64_t steps() const { return steps_; }  // calls of step(), those without any gradient included

  // For each owned parameter "<name>.step" and its moments: "<name>.exp_avg" and ".exp_avg_sq", or in 8 bits
  // "<name>.exp_avg.codes", ".exp_avg.scales",
  // ".exp_avg_sq_root.codes" and ".exp_avg_sq_root.scales"; and "steps". Views: valid until the next step().
  io::TensorMap state() const;
  // The same as parts of a checkpoint: of a slice of a parameter its moments are slices too, and its count is written
  // with the first rows.
  checkpoint::Parts state_parts() const;
  // Copies from whole tensors, those that others own may be among them. UserError names a tensor that is missing, left
  // over or misshapen, and refuses moments of the other form.
  void load_state(const io::TensorMap& state);
  int64_t state_bytes() const;  // of all moments, scales and counts

 private:
  struct Slot {
    at::Tensor exp_avg, exp_avg_sq;  // float32; undefined where the moments are
    kernels::Adamw8State quantized;  // in 8 bits
    at::Tensor step;  // float32 scalar: beside float32 moments, as the fused kernel wants it; else on the host, for
                      // nobody's sync
    bool is_8bit = false, owned = true;
    std::vector<std::pair<const char*, at::Tensor>> tensors() const;  // suffix of the name, tensor
  };
  model::ParameterRegistry& registry_;
  std::map<std::string, GroupOptions> groups_;
  AdamWOptions options_;
  bool sharded_;             // others own parameters too
  std::vector<Slot> slots_;  // in the registry's order
  int64_t steps_ = 0;
};

}  // namespace moegraft::train
