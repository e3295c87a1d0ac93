#pragma once
// Every trainable tensor, in one place. Optimizer, clipping, reduction, checkpoints, stages, export and inspect read
// only this.

#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moegraft::model {

// How processes that train together hold a parameter.
enum class Sharding {
  replicated,  // each has all of it
  expert,      // each has the rows of its own experts: of another expert index's process, other rows
};

struct Parameter {
  std::string name;   // unique, stable across runs: "adapters.0.layers.3.experts.gate.A"; for people and files, nothing
                      // is read out of it
  at::Tensor tensor;  // float32 master, a leaf that requires grad
  std::string group;  // optimizer group: "lora", "embeddings", "base", …
  std::vector<int64_t> modalities{};  // ids of those whose tokens it acts on (text is 0); empty: all (the base)
  std::optional<int64_t> layer{};     // none: used before the first layer or after the last
  Sharding sharding = Sharding::replicated;
  std::string provenance{};  // how it was initialised: "kaiming_zero", "gw_cluster", "init_from runs/a"
  // total_rows 0: the whole tensor is here. Otherwise rows [first_row, first_row + tensor.size(0)) of a tensor with
  // total_rows rows, the others on other ranks.
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
