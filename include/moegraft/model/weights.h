#pragma once
// The base's weights behind one seam. The decoder asks a WeightProvider and never learns how a weight is stored
// (memory-mapped, converted, quantised, offloaded, sharded, trained from scratch).

#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/kernels/ops.h"
#include "moegraft/model/families.h"
#include "moegraft/model/registry.h"
#include "moegraft/model/spec.h"

namespace moegraft::model {

// Linear weights are [out, in] as on disk, packed where they are frozen on a CPU that can use that; undefined where a
// family has none (biases, norms).
struct AttentionWeights {
  kernels::Matrix q, k, v, o;
  at::Tensor q_bias, k_bias, v_bias, o_bias;
  at::Tensor q_norm, k_norm;
};
// Of a dense layer's FFN, or of a sparse layer's shared expert.
struct DenseWeights {
  kernels::Matrix gate_ID, up_ID, down_DI;
  at::Tensor gate_bias_I, up_bias_I, down_bias_D;
};
// Experts first .. first+count-1 of a layer; element i is expert first+i. Views of stacked [E,F,D] storage or separate
// mapped tensors; quantised ones: panels alone.
struct ExpertWeights {
  int64_t first = 0;
  kernels::ExpertMatrices gate_FD, up_FD, down_DF;
  at::Tensor gate_EFD, up_EFD, down_EDF;            // stacked leaves when the base trains; undefined otherwise
  std::shared_ptr<kernels::ExpertPanels> panels{};  // of these experts, when frozen and on a CPU that can use them
  int64_t count() const { return as_ffn().num_experts(); }
  kernels::ExpertFfnWeights as_ffn() const { return {gate_FD, up_FD, down_DF, gate_EFD, up_EFD, down_EDF, panels}; }
};
struct LayerWeights {
  at::Tensor input_norm_D, post_norm_D;  // float32 on a CPU
  AttentionWeights attention;
  at::Tensor router_ED, router_correction_E;  // sparse layers; float32, as the router's product is
  DenseWeights dense;                         // dense layers, and sparse ones with a shared expert
  at::Tensor shared_scale_1D;                 // of a gated shared expert
};

// model.quantize as the format of its matrices; none: nothing. enum class Quantize is in model/config.h.
enum class Quantize;
std::optional<kernels::WeightFormat> weight_format(Quantize quantize);

// Whether a model's frozen experts are large enough that one packed layout must do (kernels::make_expert_panels).
bool packs_lean(const DecoderSpec& spec);

class WeightProvider {
 public:
  virtual ~WeightProvider() = default;
  virtual kernels::Matrix embedding_VD() = 0;
  virtual kernels::Matrix head_VD() = 0;  // the embedding when tied
  virtual at::Tensor final_norm_D() = 0;
  virtual LayerWeights layer(int64_t index) = 0;
  virtual ExpertWeights experts(int64_t layer, int64_t first, int64_t count) = 0;
  // Layer `layer` is wanted soon: start to bring it. Out of range: nothing.
  virtual void prefetch(int64_t layer) {}
  // True when what experts() gives is memory that another layer's weights take next: a layer must then be computed
  // again in the backward pass (which asks again), or it keeps a copy alive.
  virtual bool transient() const { return false; }
  virtual at::ScalarType dtype() const = 0;
  virtual at::Device device() const = 0;
  // True when the base itself trains (float32 master leaves).
  virtual bool trainable() const { return false; }
};

// Where a base's experts are.
enum class Experts {
  resident,   // with everything else
  offloaded,  // in host memory, page-locked where a GPU computes, and visit the device (model/offload.h)
  mapped,     // likewise, but in the memory they are read into, the mapped file as a rule: their visits are slow, and
              // nothing is locked
  absent,     // nowhere: for what runs no forward pass
};

// How weights travel from files to a device: threads read into page-locked buffers, which are copied on while others
// fill.
struct Staging {
  int64_t buffer_bytes = int64_t{256} << 20, buffers = 2;
  int64_t piece_bytes = int64_t{8} << 20, threads = 8;
};

class ExpertRing;
struct LoadOptions {
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  Experts experts = Experts::resident;
  int64_t first_expert = 0,
          num_experts = 0;  // only these of every layer, for the others live elsewhere; num_experts 0: all
  // Keeps those experts elsewhere: called with everything else's provider, given the layers' experts in host memory
  // (model/expert_ring.h). Empty: where `experts` says.
  std::function<std::shared_ptr<ExpertRing>(std::shared_ptr<WeightProvider> rest)> keep_experts{};
  std::optional<kernels::WeightFormat> quantise{};  // embedding, head and linear layers (not routers, norms, biases) in
                                                    // this format, from the file's numbers; none: in `dtype`
  std::optional<Staging>
      staging{};  // none: Staging() for a GPU; on the CPU files stay mapped, and are converted where the dtype differs
  bool progress = true;  // a bar, where a device is filled with much
};

// A Hugging Face directory, read once: config, spec, weights.
struct BaseModel {
  std::filesystem::path path;  // empty for a model initialised from scratch
  DecoderSpec spec;
  std::shared_ptr<WeightProvider> weights;
};

// Reads config.json and maps the weights. UserError: missing files, unknown family (known ones named), missing tensors,
// wrong shapes (all named).
BaseModel load_base(const std::filesystem::path& dir, const LoadOptions& options = {});
DecoderSpec read_spec(const std::filesystem::path& dir);

// A base to train from scratch: float32 leaves drawn from `seed`. Names follow the family's on-disk keys, experts
// stacked.
struct InitOptions {
  double embedding_std = 1.0;  // QUICKSTART.md: captions are hardly used when this is 0.02
  uint64_t seed = 0;
};
BaseModel init_base(const DecoderSpec& spec, const InitOptions& options);
// Adds the leaves of init_base to the registry (group "base").
void register_base(BaseModel& base, ParameterRegistry& registry);

// Writes config.json + safetensors (sharded above `max_shard_bytes`) that transformers loads.
void save_base(const BaseModel& base, const std::filesystem::path& dir, at::ScalarType dtype,
               int64_t max_shard_bytes = int64_t{5} << 30);

}  // namespace moegraft::model
