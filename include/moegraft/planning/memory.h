#pragma once
// How much memory a training run will take, known from shapes before anything is loaded, and how many layers must be
// computed again to fit a budget.

#include <torch/types.h>

#include <algorithm>
#include <string>
#include <vector>

#include "moegraft/adapters/config.h"
#include "moegraft/kernels/weight_format.h"
#include "moegraft/model/sites.h"
#include "moegraft/model/spec.h"
#include "moegraft/model/vocabulary.h"
#include "moegraft/run/records.h"
#include "moegraft/run/run_config.h"

namespace moegraft::planning {

// What the plan needs to know of a run.
struct MemoryRequest {
  model::DecoderSpec spec;
  at::ScalarType dtype = at::kFloat;                   // compute: float32 or bfloat16
  std::optional<kernels::WeightFormat> quantise = {};  // of the base's matrices; none: dtype
  at::Device device = at::kCPU;                        // the plan is of this device's memory
  bool base_trains = false, offload_experts = false, moments_8bit = false, narrow_gradients = false;
  bool converted = false;                  // the base's files hold another dtype
  bool gate_open = false;                  // adapters act on every row of a batch, which need then not be gathered
  bool auxiliary_loss = false;             // layers cannot be computed again
  int64_t tokens = 0;                      // of a micro-batch
  int64_t sequences = 1;                   // that they make at least
  int64_t expert_size = 1, data_size = 1;  // processes that experts are spread over, and that repeat them
  bool shard_base = false, shard_optimizer = false;
  int64_t bucket_bytes =
      int64_t{25} << 20;     // of gradients that are summed over processes at a time (parallel.bucket_mib)
  bool async_saves = false;  // checkpoints are written from copies
  int64_t prefix_cache = 0;  // bytes for captions; 0 where it is not used
  int64_t new_rows = 0;      // of all modalities
  struct Adapter {
    int64_t rank = 0;
    std::vector<model::Site> sites;
    std::vector<int64_t> layers;  // empty: all
    adapters::AdapterKind kind = adapters::AdapterKind::modality_lora;
  };
  std::vector<Adapter> adapters;
  int64_t budget_bytes = 0;  // 0: what the device has free, no limit where that is not known
  int64_t free_bytes = 0;    // of the device when the run starts (model::free_memory); 0: not known
};
// processes: that share the work by config.parallel; the request is of one of them. free_bytes is the caller's to fill
// in.
MemoryRequest memory_request(const model::DecoderSpec& spec, const run::RunConfig& config,
                             const model::Vocabulary& vocabulary, at::Device device, int64_t processes = 1);

// Trained parameters by shape alone: of the whole model, however many processes hold it.
struct TrainedParameters {
  int64_t lora = 0, rows = 0, base = 0;
  int64_t total() const { return lora + rows + base; }
};
TrainedParameters count_trained(const MemoryRequest& request);

// The same, place by place. The sum of parameters is count_trained's total.
std::vector<run::TrainedRow> trained_table(const MemoryRequest& request);
// As lines of a table, with float32 bytes and the share of base and trained parameters together.
std::vector<std::string> format_trained(const std::vector<run::TrainedRow>& rows, int64_t base_parameters);

// Bytes at the peak, while the first `recompute_layers` layers keep only their input. Activations are those of a batch
// whose every token is a new modality's: an upper bound for the frozen prefix and for text. Loss and workspace never
// live at the same time; the larger counts.
struct MemoryPlan {
  int64_t program = 0;      // the libraries themselves; of a GPU its context (an estimate)
  int64_t collectives = 0;  // NCCL's buffers (an estimate)
  int64_t base =
      0;  // frozen weights that stay resident; with offload, without the experts; sharded, with a part of them
  int64_t panels = 0;           // the CPU's packed copies, forward and backward
  int64_t offload_buffers = 0;  // of experts that visit
  int64_t trained = 0, gradients = 0,
          optimizer = 0;  // bf16 gradients that are summed over processes: with the float32 copies that are under way
  int64_t activations = 0, loss = 0, workspace = 0;
  int64_t heap = 0;  // free memory between live tensors that malloc keeps (host memory only)
  int64_t save_copies =
      0;  // what a checkpoint in the background is written from (host memory only; at most, of this process's share)
  int64_t prefix_cache = 0;                             // full
  int64_t host_experts = 0;                             // page-locked host memory; not part of the total of a GPU
  std::vector<int64_t> layer_stored, layer_recomputed;  // what each layer keeps for its backward pass, either way

  int64_t recompute_layers = 0;
  int64_t budget = 0, smallest = 0;  // smallest: the total with as many layers recomputed as helps
  std::string budget_source;         // empty: the config's; else what it is of
  int64_t total() const {
    return program + collectives + base + panels + offload_buffers + trained + gradients + optimizer + activations +
           std::max(loss, workspace) + heap + save_copies + prefix_cache;
  }
  bool fits() const { return budget == 0 || total() <= budget; }
};

// The smallest number of recomputed layers that fits the budget; the number that takes least where none does.
MemoryPlan plan_memory(const MemoryRequest& request);
// UserError when the plan of `request` does not fit: with the smallest possible total, and what would make it smaller.
void check_fits(const MemoryPlan& plan, const MemoryRequest& request);
std::string fit_problem(const MemoryPlan& plan, const MemoryRequest& request);  // that line
std::string summary(const MemoryPlan& plan);                                    // one line

}  // namespace moegraft::planning
