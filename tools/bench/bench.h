#pragma once
// What the benchmarks share: a clock, the machine's practical limit, memory, a plain model with LoRA on it, the work
// that a step needs.

#include <ATen/core/Tensor.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moegraft/base/clock.h"
#include "moegraft/distributed/world.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::tools::bench {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

double median(std::vector<double> values);
void synchronize(at::Device device);
void set_threads(int64_t threads);  // 0: as they are
int64_t usable_cores();

// The practical limit of this machine: a large product in the same dtype and process. Benchmarks ask before and after
// and keep the larger. size: of the square matrices; 0: 2048, or 8192 on a GPU.
double matmul_gflops(at::ScalarType dtype, at::Device device, int64_t size = 0);

// Largest resident memory of this process so far. rusage is what `time` and wait4 report; high_water (VmHWM) starts
// anew with each exec. Of a GPU: what tensors took, what the allocator held for them, and all that the card has lost
// (with the context, and with other processes).
struct PeakMemory {
  double rusage_mib = 0, high_water_mib = 0, device_mib = 0, reserved_mib = 0, card_mib = 0;
};
PeakMemory peak_memory(at::Device device);

// Where and by what a figure was made: device, card (name, driver, memory, clocks, power and temperature now, by
// nvidia-smi; null on a CPU), cpu, threads, commit.
Json describe_place(at::Device device);

struct ModelOptions {
  std::string model, dtype = "bfloat16", device = "cpu", quantize = "none";
  std::string random;  // a config.json (or a folder that holds one) to draw random weights for, instead of a model
  int64_t layers = 0;  // > 0: only so many of that model
  std::vector<std::string> sites{"gate", "up", "down"};
  int64_t rank = 16;  // 0: no adapter
  int64_t codes = 0;  // > 0: rows of a made-up modality "image" with that many codes
  int64_t item_length = 1;
};
void add_model_options(CLI::App& cmd, ModelOptions& o);
void add_random_options(CLI::App& cmd, ModelOptions& o);
// A Hugging Face directory, or random weights, with random LoRA (and rows) on it, registered for training. UserError: a
// run directory. UsageError: a base that cannot be had. mesh: the processes that hold it together; shard_base as in a
// run's config.
graft::GraftedModel open_model(const ModelOptions& o, const distributed::Mesh* mesh = nullptr, bool shard_base = false);

// Runs `work` in this process's place among those that a launcher started (alone where none did). They must agree on
// `options` first; a failure in one ends the others. backend_for_one: one process alone sends its collectives through
// Gloo or NCCL too.
void with_world(const std::string& device, const std::string& options,
                const std::function<void(const std::shared_ptr<distributed::World>&)>& work,
                bool backend_for_one = false);

// Uniform ids in [3, vocab), the same in every process.
at::Tensor random_ids(at::IntArrayRef shape, int64_t vocab, uint64_t seed = 0);

// The same for all of a model's parameters.
std::map<std::string, train::GroupOptions> every_group(const model::ParameterRegistry& registry,
                                                       const train::GroupOptions& options);

// Self times of the operations of one stretch of work (ATen's, autograd's nodes and RECORD_FUNCTION marks). On a GPU
// every operation is waited for, which makes the stretch slower than it is. Process-wide: one at a time.
class OpProfile {
 public:
  explicit OpProfile(at::Device device);
  ~OpProfile();
  OpProfile(const OpProfile&) = delete;
  void phase(const std::string& name);  // what follows belongs to it
  Json finish();  // {total_s, phases: [{name, s, unmarked_s}], ops: [{op, phase, calls, self_s, share}]}, largest first
  static void print(const Json& profile, size_t rows);
};

// Runs this program again with `args`, after the options that stood before this command (--cpu-path, …): {exit code,
// stdout, stderr}. A fresh process has its own memory peak.
struct ChildResult {
  int code = 0;  // 128 + the signal when one ended it
  std::string out, err;
};
ChildResult run_self(const std::vector<std::string>& args);

void print_table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows);
std::string fixed(double value, int digits);

// One subcommand each. The step's options are also those of `bench` itself: `bench MODEL` is `bench step MODEL`.
std::function<void()> add_step_options(CLI::App& cmd);
void add_ops_command(CLI::App& bench);
void add_collectives_command(CLI::App& bench);
void add_generate_command(CLI::App& bench);
void add_growth_command(CLI::App& bench);
void add_captions_command(CLI::App& bench);
void add_contention_command(CLI::App& bench);

}  // namespace moegraft::tools::bench
