#include "startup.h"

#include "libtorch.h"

#include <chrono>
#include <cmath>
#include <thread>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/data/stream.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;

void describe(const graft::GraftedModel& m, const run::RunConfig& config) {
  const auto& s = m.decoder->spec();
  const auto trained = count_trained(memory_request(s, config, m.vocabulary, m.device()));
  const double overlays = double(trained.lora + trained.rows), base = double(s.num_parameters());
  const bool full = m.decoder->base().weights->trainable();
  log::info(s.family, ": ", format_count(base), " parameters, ", format_count(double(s.num_active_parameters())), " active per token; training ", format_count(double(trained.total())), " (",
            full ? 100.0 : std::round(1000 * overlays / (base + overlays)) / 10, " %)");
}

void write_beside(const fs::path& run, const graft::GraftedModel& model) {
  if (model.vocabulary.modalities.empty()) return;
  graft::write_vocabulary(run, model.vocabulary);
  io::write_file_atomic(run / "init.json", model.init_report_json + "\n");
}

std::optional<fs::path> checkpoint_to_continue(const run::RunConfig& config, const std::string& resume) {
  const bool exists = run::is_run(config.run.dir);
  if (resume == "none") return {};
  if (resume == "auto") return exists ? checkpoint::find_latest(fs::path(config.run.dir) / "checkpoints") : std::nullopt;
  MOEGRAFT_CHECK_USAGE(exists, "--resume ", resume, ": ", config.run.dir, " is no run yet");
  return fs::path(resume);
}

run::RunDir open_dir(const run::RunConfig& config, const std::string& resume, const std::optional<checkpoint::Checkpoint>& from, const std::string& device) {
  const bool again = run::is_run(config.run.dir) && resume != "none";
  return again ? run::RunDir::resume(config, from ? from->step : 0, device) : run::RunDir::create(config, device);
}

// Rank 0 by itself: builds a new run's model and saves it as step 0.
fs::path save_new_run(const run::RunConfig& config, const run::RunDir& dir) {
  run::RunConfig alone = config;
  const bool together_only = config.parallel.expert > 1 || config.parallel.shard_base;  // one GPU may not hold the whole base
  if (together_only && graft::parse_device(config.model.device).is_cuda()) alone.model.offload = "experts";
  graft::GraftedModel model = graft::build_model(alone);
  write_beside(dir.path(), model);
  const AdamW optimizer = make_optimizer(*model.registry, config.train);
  checkpoint::TrainState state;
  state.seed = config.run.seed;
  state.environment = run::describe_environment(model.device().str());
  state.data_cursor = data::BatchStream(config.data.train, config.data, model.vocabulary, uint64_t(config.run.seed)).state();
  checkpoint::CheckpointConfig at_once = config.checkpoint;
  at_once.async = false;
  return checkpoint::CheckpointWriter(dir.checkpoints(), at_once).save(0, checkpoint::parameter_parts(*model.registry), optimizer.state_parts(), checkpoint::to_json(state));
}

// What rank 0 has to say once it has opened or made the run: a checkpoint's path, or why there is none.
constexpr const char* kStart = "start of the run";

fs::path wait_for_rank_0(distributed::World& world, double minutes) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  while (true) {
    if (const auto said = world.look(kStart)) {
      const auto j = io::Json::parse(*said);
      MOEGRAFT_CHECK(!j.contains("error"), "rank 0 could not start the run: ", j.value("error", ""));
      return fs::path(j.at("checkpoint").get<std::string>());
    }
    MOEGRAFT_CHECK(Clock::now() - start < std::chrono::duration<double>(60 * minutes), "rank ", world.rank(), " waited ", minutes,
                   " minutes for rank 0 to make the run; raise parallel.startup_minutes if its initialisation takes longer");
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

}  // namespace

AdamW make_optimizer(model::ParameterRegistry& registry, const run::TrainSection& t, std::vector<bool> owned) {
  const auto options = [](const run::OptimizerGroup& g) { return GroupOptions{g.lr, g.weight_decay}; };
  return AdamW(registry, {{"lora", options(t.lora)}, {"embeddings", options(t.embeddings)}, {"base", options(t.base)}},
               {t.betas[0], t.betas[1], t.adam_epsilon, t.optimizer == "adamw_8bit"}, std::move(owned));
}

void check_layout(const run::RunConfig& config, int64_t world_size) {
  const auto& p = config.parallel;
  MOEGRAFT_CHECK_USAGE(world_size % p.expert == 0, "parallel.expert (", p.expert, ") must divide the number of processes, got ", world_size);
  if (config.model.path.empty()) return;
  const model::DecoderSpec spec = model::read_spec(config.model.path);
  MOEGRAFT_CHECK_USAGE(p.expert == 1 || spec.num_experts % p.expert == 0, "parallel.expert (", p.expert, ") must divide the ", spec.num_experts, " experts of ", config.model.path);
  // Before anything is loaded or made, and so without the new rows, whose number the codecs know.
  check_fits(plan_memory(memory_request(spec, config, {}, graft::parse_device(config.model.device), world_size)));
}

std::vector<distributed::World::Fact> facts_of(const run::RunConfig& config, const std::string& resume) {
  std::vector<distributed::World::Fact> facts;
  const auto environment = run::describe_environment(config.model.device);
  for (const char* name : {"binary", "libtorch"}) facts.push_back({name, environment.at(name)});
  facts.push_back({"--resume", resume});
  for (const auto& [key, value] : run::flat_config(config)) facts.push_back({key, value});
  if (!config.model.path.empty())
    for (const auto& entry : fs::directory_iterator(config.model.path)) {
      const std::string name = entry.path().filename().string();
      // Weights by their size: reading them all would take minutes.
      if (name.ends_with(".safetensors")) facts.push_back({"size of " + entry.path().string(), std::to_string(entry.file_size())});
      if (name == "config.json") facts.push_back({"checksum of " + entry.path().string(), std::to_string(io::checksum_file(entry.path()))});
    }
  return facts;
}

Start start_run(const run::RunConfig& config, const std::string& resume, const distributed::Mesh& mesh) {
  Start start;
  const bool first = mesh.world->rank() == 0;
  if (!mesh.distributed()) {
    if (const auto path = checkpoint_to_continue(config, resume)) start.from = checkpoint::load(*path);
    start.dir.emplace(open_dir(config, resume, start.from, graft::parse_device(config.model.device).str()));
    start.model = start.from ? graft::assemble_model(config) : graft::build_model(config);
    if (!start.from) write_beside(start.dir->path(), start.model);
  } else {
    if (first) {
      try {
        if (const auto path = checkpoint_to_continue(config, resume)) start.from = checkpoint::load(*path);
        start.dir.emplace(open_dir(config, resume, start.from, graft::parse_device(config.model.device).str()));
        if (!start.from) start.from = checkpoint::load(save_new_run(config, *start.dir));
        mesh.world->post(kStart, io::Json{{"checkpoint", start.from->dir.string()}}.dump());
      } catch (const std::exception& e) {
        mesh.world->post(kStart, io::Json{{"error", e.what()}}.dump());
        throw;
      }
    } else {
      const fs::path path = wait_for_rank_0(*mesh.world, config.parallel.startup_minutes);
      MOEGRAFT_CHECK(fs::is_directory(path), "rank ", mesh.world->rank(), " does not see the checkpoint ", path.string(), ": run.dir must lie on a file system that all processes share");
      start.from = checkpoint::load(path);
    }
    graft::OpenOptions options;
    options.mesh = &mesh;
    start.model = graft::assemble_model(config, options);
  }
  if (start.from) {
    checkpoint::load_parameters(*start.model.registry, start.from->parameters);
    if (start.from->step > 0) log::info("resuming ", config.run.dir, " after step ", start.from->step);
  }
  describe(start.model, config);
  start.plan = plan_memory(memory_request(start.model.decoder->spec(), config, start.model.vocabulary, start.model.device(), mesh.world->size()));
  check_fits(start.plan);
  log::info(summary(start.plan));
  return start;
}

}  // namespace moegraft::train
