// moegraft bench: a whole LoRA training step on all experts, gate open, every token labelled, nothing skipped: what transformers + PEFT would do.
#include <sys/resource.h>
#include "libtorch.h"

#include <chrono>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/adapters/modality_lora.h"
#include "moegraft/base/check.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/graft/initialise_lora.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::tools {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string model, ids, dtype = "bfloat16", device = "cpu";
  int64_t batch = 4, seq = 512, rank = 16, steps = 5, threads = 0;
  bool json = false;
};

double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

void synchronize(at::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize();
}

// The practical limit of this machine: a large product in the same dtype and process.
double matmul_gflops(at::ScalarType dtype, at::Device device) {
  const int64_t n = device.is_cpu() ? 2048 : 8192, repeats = 5;
  const at::Tensor x = at::randn({n, n}, at::TensorOptions(at::kFloat).device(device)).to(dtype), y = at::randn({n, n}, at::TensorOptions(at::kFloat).device(device)).to(dtype);
  at::mm(x, y);
  synchronize(device);
  const auto start = Clock::now();
  for (int64_t i = 0; i < repeats; ++i) at::mm(x, y);
  synchronize(device);
  return double(repeats) * 2 * std::pow(double(n), 3) / since(start) / 1e9;
}

double peak_mib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_maxrss) / 1024;
}

at::Tensor load_ids(const Options& o, int64_t vocab) {
  if (o.ids.empty()) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{0});
    return at::empty({o.batch, o.seq}, at::kLong).random_(std::min<int64_t>(3, vocab - 1), vocab, generator);
  }
  const io::SafetensorsFile file(o.ids);
  const at::Tensor ids = file.tensor("input_ids");
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong, o.ids, ": input_ids must be int64 [batch, seq], got ", ids.sizes().vec());
  return ids.clone();
}

void run(const Options& o) {
  if (o.threads > 0) at::set_num_threads(int(o.threads));
  graft::OpenOptions open;
  open.dtype = graft::parse_dtype(o.dtype);
  open.device = o.device;
  graft::GraftedModel m = graft::open_model(o.model, open);
  MOEGRAFT_CHECK(!m.is_graft(), o.model, ": bench takes a Hugging Face directory");
  const at::Device device = m.device();

  adapters::AdapterConfig config;
  config.rank = o.rank;
  config.alpha = 2.0 * double(o.rank);
  config.sites = {"gate", "up", "down"};
  auto lora = std::make_shared<adapters::ModalityLora>(m.decoder->spec(), config, 0, std::vector<int64_t>{1}, device);
  graft::initialise_lora(*lora, "kaiming_zero", nullptr, 1, run::OtSection{}, 0);
  lora->register_parameters(*m.registry, "kaiming_zero");
  m.decoder->attach(lora);
  train::AdamW optimizer(*m.registry, {{"lora", {1e-4, 0.01}}}, {0.9, 0.999, 1e-8});

  const at::Tensor ids = load_ids(o, m.decoder->spec().vocab_size).to(device);
  const int64_t B = ids.size(0), S = ids.size(1);
  model::PackedBatch batch = model::pack_rows(ids);
  batch.labels_T = at::cat({ids.narrow(1, 1, S - 1), at::full({B, 1}, model::kNoLabel, ids.options())}, 1).reshape({-1});
  model::ForwardOptions options;
  options.gate = model::Gate::all;

  std::vector<double> times, losses;
  for (int64_t i = 0; i < o.steps; ++i) {
    synchronize(device);
    const auto start = Clock::now();
    m.registry->zero_grad();
    const auto result = m.decoder->forward(batch, options);
    const auto loss = model::cross_entropy_loss(*m.decoder, result.hidden_TD, batch.labels_T);
    loss.loss.backward();
    optimizer.step(1.0);
    synchronize(device);
    times.push_back(since(start));
    losses.push_back(loss.loss.item<double>());
  }
  const double best = *std::min_element(times.begin(), times.end()), peak = peak_mib();
  const nlohmann::json out{{"tool", "moegraft"},   {"tokens_per_s", double(B * S) / best}, {"step_s", times}, {"loss", losses},  {"peak_mib", peak},
                           {"matmul_gflops", matmul_gflops(*open.dtype, device)},        {"dtype", o.dtype}, {"batch", B},     {"seq", S},
                           {"rank", o.rank},       {"threads", at::get_num_threads()},   {"device", device.str()}};
  if (o.json) std::cout << out.dump() << '\n';
  else std::cout << double(B * S) / best << " tokens/s, best step " << best << " s, peak " << peak << " MiB, matmul limit " << out["matmul_gflops"] << " GF/s, loss " << losses.front() << " -> " << losses.back() << '\n';
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* cmd = app.add_subcommand("bench", "Time a LoRA training step on all experts of a model");
  cmd->add_option("model", o->model, "Hugging Face directory")->required();
  cmd->add_option("--batch", o->batch, "Sequences")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  cmd->add_option("--seq", o->seq, "Tokens of a sequence")->check(CLI::Range(2, 1 << 24))->capture_default_str();
  cmd->add_option("--dtype", o->dtype, "float32 or bfloat16")->capture_default_str();
  cmd->add_option("--rank", o->rank, "LoRA rank")->check(CLI::Range(1, 1024))->capture_default_str();
  cmd->add_option("--steps", o->steps, "Steps to time; the best counts")->check(CLI::Range(1, 100000))->capture_default_str();
  cmd->add_option("--device", o->device, "cpu or cuda")->capture_default_str();
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_option("--ids", o->ids, "safetensors with input_ids int64 [batch, seq] instead of random ids");
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer("Example: moegraft bench models/base --batch 4 --seq 512 --dtype bfloat16 --rank 16 --steps 5 --json");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools
