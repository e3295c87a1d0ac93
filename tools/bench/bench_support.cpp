// Clock, limits, memory, models and child processes of the benchmarks.
#include <ATen/DeviceAccelerator.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libtorch.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

#include "bench.h"
#include "cpu.h"
#include "moegraft/adapters/adapter.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/graft/initialise_lora.h"
#include "moegraft/model/random_base.h"
#include "moegraft/parallel/part.h"
#include "moegraft/run/run_dir.h"

namespace moegraft::tools::bench {

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n == 0 ? 0 : n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

void synchronize(at::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize();
}

void set_threads(int64_t threads) {
  if (threads > 0) at::set_num_threads(int(threads));
}

int64_t usable_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

double matmul_gflops(at::ScalarType dtype, at::Device device, int64_t size) {
  const at::NoGradGuard no_grad;
  const int64_t n = size > 0 ? size : device.is_cpu() ? 2048 : 8192, repeats = 5;
  const auto options = at::TensorOptions(dtype).device(device);
  const at::Tensor x = at::empty({n, n}, options).normal_(), y = at::empty({n, n}, options).normal_();
  at::Tensor z = at::mm(x, y);
  synchronize(device);
  const auto start = Clock::now();
  for (int64_t i = 0; i < repeats; ++i) at::mm_out(z, x, y);
  synchronize(device);
  return double(repeats) * 2 * double(n) * double(n) * double(n) / seconds_since(start) / 1e9;
}

PeakMemory peak_memory(at::Device device) {
  PeakMemory peak;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  peak.rusage_mib = double(usage.ru_maxrss) / 1024;
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) peak.high_water_mib = std::stod(line.substr(6)) / 1024;
  if (device.is_cuda()) {
    constexpr size_t kAll = 0;  // c10's StatType::AGGREGATE
    const auto index = c10::DeviceIndex(device.has_index() ? device.index() : 0);
    const auto stats = at::accelerator::getDeviceStats(index);
    const auto [free, total] = at::accelerator::getMemoryInfo(index);
    peak.device_mib = double(stats.allocated_bytes[kAll].peak) / (1 << 20);
    peak.reserved_mib = double(stats.reserved_bytes[kAll].peak) / (1 << 20);
    peak.card_mib = double(total - free) / (1 << 20);
  }
  return peak;
}

namespace {

// First line that a command writes; empty when it fails.
std::string first_line(const std::string& command) {
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return {};
  char line[1024] = {};
  const bool read = fgets(line, sizeof line, pipe) != nullptr;
  return pclose(pipe) == 0 && read ? trim(line) : std::string();
}

Json describe_card(at::Device device) {
  if (!device.is_cuda()) return nullptr;
  const char* keys[] = {"name",       "driver_version", "memory.total", "clocks.sm",      "clocks.max.sm",
                        "clocks.mem", "power.draw",     "power.limit",  "temperature.gpu"};
  std::string query;
  for (const char* key : keys) query += (query.empty() ? "" : ",") + std::string(key);
  const std::string line = first_line("nvidia-smi --query-gpu=" + query + " --format=csv,noheader,nounits -i " +
                                      std::to_string(device.has_index() ? device.index() : 0));
  if (line.empty()) return {{"name", "unknown: nvidia-smi did not answer"}};
  const auto values = split(line, ',');
  Json card;
  for (size_t i = 0; i < std::size(keys) && i < values.size(); ++i) card[keys[i]] = trim(values[i]);
  return card;
}

}  // namespace

Json describe_place(at::Device device) {
  return {{"device", device.str()},
          {"card", describe_card(device)},
          {"cpu", describe_cpu()},
          {"threads", at::get_num_threads()},
          {"commit", run::git_commit()}};
}

void add_model_options(CLI::App& cmd, ModelOptions& o) {
  cmd.add_option("model", o.model, "Hugging Face directory");
  cmd.add_option("--dtype", o.dtype, "float32 or bfloat16")->capture_default_str();
  cmd.add_option("--device", o.device, "cpu or cuda")->capture_default_str();
  cmd.add_option("--rank", o.rank, "LoRA rank")->check(CLI::Range(1, 1024))->capture_default_str();
  cmd.add_option("--sites", o.sites, "Where LoRA acts: gate up down q k v o")->delimiter(',')->capture_default_str();
  cmd.add_option("--quantize", o.quantize, "How the base's matrices are stored: none or q8_0")->capture_default_str();
}

void add_random_options(CLI::App& cmd, ModelOptions& o) {
  cmd.add_option("--random", o.random,
                 "A config.json, or a folder that holds one: random weights of that model, drawn on the device, "
                 "instead of a checkpoint");
  cmd.add_option("--layers", o.layers, "With --random: only so many layers; 0: all")->check(CLI::Range(0, 1 << 16));
}

namespace {

// Small random numbers, as a fresh graft has.
at::Tensor random_rows(int64_t count, int64_t width, at::Device device, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::empty({count, width}, at::kFloat).normal_(0.0, 0.02, generator).to(device).set_requires_grad(true);
}

void add_modality(graft::GraftedModel& m, int64_t codes, int64_t item_length) {
  const model::DecoderSpec& spec = m.decoder->spec();
  const model::ModalityTokens tokens{"image", 1, spec.vocab_size, codes, item_length};
  model::ModalityRows rows{
      tokens.modality, tokens.first_id, random_rows(tokens.num_rows(), spec.hidden_size, m.device(), 1), {}};
  rows.head_ND =
      spec.tie_word_embeddings ? rows.embedding_ND : random_rows(tokens.num_rows(), spec.hidden_size, m.device(), 2);
  m.registry->add({.name = "rows.image.embedding",
                   .tensor = rows.embedding_ND,
                   .group = "embeddings",
                   .modalities = {tokens.modality},
                   .provenance = "random"});
  if (!spec.tie_word_embeddings)
    m.registry->add({.name = "rows.image.head",
                     .tensor = rows.head_ND,
                     .group = "embeddings",
                     .modalities = {tokens.modality},
                     .provenance = "random"});
  m.vocabulary.modalities.push_back(tokens);
  m.decoder->attach_rows(std::move(rows));
}

at::Device device_of(const ModelOptions& o) {
  return graft::device_of(config::parse_choice<config::Device>("--device", o.device));
}

graft::GraftedModel open_whole(const ModelOptions& o) {
  graft::OpenOptions open;
  open.dtype = graft::parse_dtype(o.dtype);
  open.quantize = config::parse_choice<model::Quantize>("--quantize", o.quantize);
  open.device = config::parse_choice<config::Device>("--device", o.device);
  graft::GraftedModel m = graft::open_model(o.model, open);
  MOEGRAFT_CHECK(!m.is_graft(), o.model, ": bench takes a Hugging Face directory, not a run");
  return m;
}

graft::GraftedModel draw_model(const ModelOptions& o) {
  const std::filesystem::path path = o.random;
  model::DecoderSpec spec = std::filesystem::is_directory(path) ? model::read_spec(path) : model::read_spec_file(path);
  if (o.layers > 0) spec = model::cut_layers(std::move(spec), o.layers);
  graft::GraftedModel m;
  m.registry = std::make_unique<model::ParameterRegistry>();
  m.vocabulary = {spec.vocab_size, spec.bos_id, spec.eos_id, {}};
  m.decoder = std::make_unique<model::Decoder>(
      model::random_base(spec, graft::parse_dtype(o.dtype), device_of(o), 0,
                         model::weight_format(config::parse_choice<model::Quantize>("--quantize", o.quantize))));
  return m;
}

// Of one of several processes; experts: those that are here, count 0 for all.
graft::GraftedModel open_part(const ModelOptions& o, const distributed::Mesh& mesh, bool shard_base,
                              std::pair<int64_t, int64_t>& experts) {
  graft::GraftedModel m;
  m.path = m.base_path = o.model;
  m.registry = std::make_unique<model::ParameterRegistry>();
  model::LoadOptions load{graft::parse_dtype(o.dtype), device_of(o)};
  load.quantise = model::weight_format(config::parse_choice<model::Quantize>("--quantize", o.quantize));
  parallel::Part part = parallel::load_part(o.model, load, mesh, shard_base);
  experts = part.experts;
  m.sharded = std::move(part.sharded);
  m.decoder = std::make_unique<model::Decoder>(std::move(part.base));
  m.decoder->set_dispatcher(std::move(part.dispatcher));
  const auto& s = m.decoder->spec();
  m.vocabulary = {s.vocab_size, s.bos_id, s.eos_id, {}};
  return m;
}

}  // namespace

graft::GraftedModel open_model(const ModelOptions& o, const distributed::Mesh* mesh, bool shard_base) {
  MOEGRAFT_CHECK_USAGE(!o.model.empty() || !o.random.empty(),
                       "bench: give a model: a Hugging Face directory, or --random CONFIG.json");
  MOEGRAFT_CHECK_USAGE(o.model.empty() || o.random.empty(), "bench: ", o.model, " and --random ", o.random,
                       ": one of them");
  MOEGRAFT_CHECK_USAGE(o.layers == 0 || !o.random.empty(),
                       "--layers cuts random weights; a checkpoint is taken whole: give --random CONFIG.json");
  for (const auto& site : o.sites) adapters::parse_site(site);
  std::pair<int64_t, int64_t> experts{0, 0};
  const bool distributed = mesh && mesh->distributed();
  MOEGRAFT_CHECK_USAGE(o.random.empty() || !distributed,
                       "--random is for one process; several need a checkpoint to share");
  graft::GraftedModel m = !o.random.empty() ? draw_model(o)
                          : distributed     ? open_part(o, *mesh, shard_base, experts)
                                            : open_whole(o);
  if (o.codes > 0) add_modality(m, o.codes, o.item_length);
  if (o.rank > 0) {
    adapters::AdapterConfig config;
    config.rank = o.rank;
    config.alpha = 2.0 * double(o.rank);
    config.sites = o.sites;
    auto adapter = adapters::make_adapter({m.decoder->spec(), config, 0, {1}, m.device(), experts});
    graft::initialise_lora(*adapter, config.init, nullptr, 1, ot::OtConfig{}, 0);
    adapter->register_parameters(*m.registry);
    m.adapters = std::make_shared<adapters::AdapterStack>();
    m.adapters->add(std::move(adapter));
    m.decoder->attach(m.adapters);
  }
  return m;
}

void with_world(const std::string& device, const std::string& options,
                const std::function<void(const std::shared_ptr<distributed::World>&)>& work, bool backend_for_one) {
  const auto environment = distributed::read_launch_environment();
  if (environment.distributed()) log::set_rank(environment.rank);
  distributed::WorldOptions world_options;
  world_options.device = graft::choose_device(config::parse_choice<config::Device>("--device", device),
                                              environment.local_rank, environment.local_world_size);
  world_options.backend_for_one = backend_for_one;
  const auto world = distributed::World::join(environment, world_options);
  world->agree({{"version", MOEGRAFT_VERSION}, {"options", options}});
  try {
    work(world);
  } catch (const std::exception& e) {
    world->announce_failure(e.what());
    throw;
  }
}

at::Tensor random_ids(at::IntArrayRef shape, int64_t vocab, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::empty(shape, at::kLong).random_(std::min<int64_t>(3, vocab - 1), vocab, generator);
}

std::map<std::string, train::GroupOptions> every_group(const model::ParameterRegistry& registry,
                                                       const train::GroupOptions& options) {
  std::map<std::string, train::GroupOptions> groups;
  for (const auto& p : registry.all()) groups[p.group] = options;
  return groups;
}

namespace {

std::string read_all(int fd) {
  std::string text;
  char buffer[4096];
  lseek(fd, 0, SEEK_SET);
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
  close(fd);
  return text;
}

int unlinked_file() {
  char name[] = "/tmp/moegraft-bench-XXXXXX";
  const int fd = mkstemp(name);
  MOEGRAFT_CHECK(fd >= 0, "cannot make a temporary file in /tmp");
  unlink(name);
  return fd;
}

// What this process was started with before the word bench.
std::vector<std::string> options_before_bench() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> options;
  std::string word;
  std::getline(file, word, '\0');  // the program
  while (std::getline(file, word, '\0') && word != "bench") options.push_back(word);
  return options;
}

}  // namespace

ChildResult run_self(const std::vector<std::string>& args) {
  const int out = unlinked_file(), err = unlinked_file();
  std::vector<char*> argv{const_cast<char*>("moegraft")};
  std::vector<std::string> before = options_before_bench();
  for (auto& option : before) argv.push_back(option.data());
  for (const auto& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  const pid_t pid = fork();
  MOEGRAFT_CHECK(pid >= 0, "cannot start a process");
  if (pid == 0) {
    dup2(out, 1);
    dup2(err, 2);
    execv("/proc/self/exe", argv.data());
    _exit(127);
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read_all(out), read_all(err)};
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

// First column left, the others right.
void print_table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows) {
  std::vector<int> width;
  for (size_t c = 0; c < header.size(); ++c) {
    size_t w = header[c].size();
    for (const auto& row : rows) w = std::max(w, row.at(c).size());
    width.push_back(int(w));
  }
  const auto line = [&](const std::vector<std::string>& row) {
    for (size_t c = 0; c < row.size(); ++c) std::printf(c == 0 ? "%-*s" : "  %*s", width[c], row[c].c_str());
    std::printf("\n");
  };
  line(header);
  for (const auto& row : rows) line(row);
}

}  // namespace moegraft::tools::bench
