#pragma once
// How a run's low-rank terms lie in PEFT's tensors. Pure functions of shapes and factors.

#include <torch/types.h>

#include <string>
#include <vector>

#include "moegraft/adapters/adapter.h"
#include "moegraft/model/spec.h"

namespace moegraft::exporting {

// A factor pair of a run inside a target: its rank rows start at rank_begin, its output rows at out_begin (up lies
// below gate).
struct Term {
  size_t adapter = 0;
  model::Site site = model::Site::q;
  at::Tensor A, B;  // experts: A [E,P,in], B [E,out,P]; dense: A [P,in], B [out,P]; float32 on the CPU
  double scale = 1;
  int64_t rank_begin = 0, out_begin = 0;
  int64_t rank() const { return A.size(-2); }
};

// One weight that PEFT adapts.
struct Target {
  int64_t layer = 0;
  std::string
      module;  // "self_attn.q_proj", "mlp.gate_proj", or of experts "mlp.experts.gate_up_proj": model::peft_module
  bool experts = false;
  int64_t num_experts = 1, in = 0, out = 0, rank = 0;
  std::vector<Term> terms;
  std::string path() const { return "model.layers." + std::to_string(layer) + "." + module; }
};

// The targets of all adapters, by layer, experts' gate_up before down.
std::vector<Target> collect_targets(const model::DecoderSpec& spec,
                                    const std::vector<std::shared_ptr<adapters::Adapter>>& adapters);

// Key of lora_A / lora_B. PEFT nests its wrappers when both expert weights of a layer are targeted: gate_up is then the
// inner one, whatever the order in its config; a single target takes the outer place.
std::string tensor_key(const Target& target, const std::vector<Target>& all, const char* factor);

struct Factors {
  at::Tensor A, B;
};
// PEFT's tensors with the terms' scales relative to `scale` folded into B. Dense: A [r,in], B [out,r]. Experts: A
// [E*r,in] with row e*r+k and B [out,E*r] with column k*E+e.
Factors pack(const Target& target, double scale);

}  // namespace moegraft::exporting
