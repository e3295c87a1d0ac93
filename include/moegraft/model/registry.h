#pragma once
// Every trainable tensor, in one place. Optimizer, clipping, reduction, checkpoints, stages, export and inspect read only this.

#include <torch/types.h>

#include <string>
#include <vector>

namespace moegraft::model {

struct Parameter {
  std::string name;        // unique, stable across runs: "adapters.0.layers.3.experts.gate.A"
  at::Tensor tensor;       // float32 master, a leaf that requires grad
  std::string group;       // optimizer group: "lora", "embeddings", "base", …
  std::string modality{};  // "image"; empty for the base
  std::string sharding = "replicated";  // replicated | expert
  std::string provenance{};  // how it was initialised: "kaiming_zero", "gw_cluster", "init_from runs/a"
  // total_rows 0: the whole tensor is here. Otherwise rows [first_row, first_row + tensor.size(0)) of a tensor with total_rows rows, the others on other ranks.
  int64_t first_row = 0, total_rows = 0;
};

class ParameterRegistry {
 public:
  // Throws InvariantError on a duplicate name or a tensor that is not a float32 leaf requiring grad.
  void add(Parameter parameter);
  const std::vector<Parameter>& all() const { return parameters_; }
  const Parameter* find(const std::string& name) const;  // null when absent
  int64_t num_elements() const;
  void zero_grad();  // grads become undefined
  void set_trainable(const std::string& pattern_prefix, bool trainable);

 private:
  std::vector<Parameter> parameters_;
};

}  // namespace moegraft::model
