#include "startup.h"

#include "libtorch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/codec/codec.h"
#include "moegraft/data/stream.h"
#include "moegraft/graft/calibration.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/model/device.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;

void describe(const graft::GraftedModel& m, const run::RunConfig& config) {
  const auto& s = m.decoder->spec();
  const auto trained = planning::count_trained(planning::memory_request(s, config, m.vocabulary, m.device()));
  const double overlays = double(trained.lora + trained.rows), base = double(s.num_parameters());
  const bool full = m.decoder->base().weights->trainable();
  log::info(s.family, ": ", format_count(base), " parameters, ", format_count(double(s.num_active_parameters())),
            " active per token; training ", format_count(double(trained.total())), " (",
            full ? 100.0 : std::round(1000 * overlays / (base + overlays)) / 10, " %)");
}

void write_beside(const fs::path& run, const graft::GraftedModel& model) {
  if (model.vocabulary.modalities.empty()) return;
  graft::write_vocabulary(run, model.vocabulary);
  io::write_file_atomic(run / "init.json", model.init_report_json + "\n");
}

// Where a session begins.
struct Origin {
  std::optional<fs::path> checkpoint;
  bool branches = false;  // from another run's checkpoint
};

// Nothing that could be gone on from is removed: an older checkpoint of the run continues in a run of its own.
Origin find_origin(const fs::path& dir, const std::string& resume) {
  const fs::path own = dir / "checkpoints";
  if (resume == "none") return {};
  if (resume == "auto" || resume == "latest") return {run::is_run(dir) ? checkpoint::find_latest(own) : std::nullopt};
  fs::path asked = fs::absolute(resume).lexically_normal();
  if (!asked.has_filename()) asked = asked.parent_path();
  if (run::is_run(asked)) {  // a run stands for its newest checkpoint
    const auto latest = checkpoint::find_latest(asked / "checkpoints");
    MOEGRAFT_CHECK(latest.has_value(), "--resume ", resume, ": the run has saved no checkpoint yet");
    asked = *latest;
  }
  MOEGRAFT_CHECK_USAGE(fs::is_directory(asked) && fs::exists(asked / "manifest.json"), "--resume ", resume,
                       " is no checkpoint: expected none, auto, a run or one of its checkpoints/step-… folders");
  std::error_code error;
  if (!fs::equivalent(asked.parent_path(), own, error)) return {asked, true};
  std::vector<std::string> newer;
  for (const auto& other : checkpoint::list_checkpoints(own))
    if (other.filename() > asked.filename() && checkpoint::find_damage(other).empty())
      newer.push_back(other.filename().string());
  MOEGRAFT_CHECK_USAGE(newer.empty(), "--resume ", resume, ": the run has newer checkpoints (", join(newer, ", "),
                       "), which going on from here would overwrite: --resume auto goes on from the newest, "
                       "or name a new run.dir, and the run branches there from this one");
  return {asked};
}

run::RunDir open_dir(const run::RunConfig& config, const std::string& resume, const Origin& origin,
                     const std::optional<checkpoint::Checkpoint>& from, const run::Fingerprints& fingerprints,
                     const std::string& device, bool accept_data) {
  if (origin.branches)
    return run::RunDir::branch(config, fingerprints, *origin.checkpoint, from->step, device, accept_data);
  // A run that has trained nothing has nothing to keep to: a corrected config may take it over.
  if (resume != "none" && from) return run::RunDir::resume(config, fingerprints, from->step, device, accept_data);
  return run::RunDir::create(config, fingerprints, device, resume != "none");
}

// What is wrong with paths and sizes shows before the run's directory is made.
void check_inputs(const run::RunConfig& config) {
  MOEGRAFT_CHECK_USAGE(!config.run.dir.empty(), "run.dir is required: the directory of the run");
  if (!config.model.init) model::read_spec(config.model.path);
  for (const auto& [name, modality] : config.modalities) codec::load_codec(modality.codec);
}

// Rank 0 by itself: builds a new run's model and saves it as step 0.
fs::path save_new_run(const run::RunConfig& config, const run::RunDir& dir, const run::Fingerprints& fingerprints) {
  graft::OpenOptions options;
  options.experts = experts_of_new_run(config, graft::device_of(config.model.device).is_cuda());
  graft::GraftedModel model = graft::build_model(config, options);
  write_beside(dir.path(), model);
  const AdamW optimizer = make_optimizer(*model.registry, config.train);
  checkpoint::TrainState state;
  state.seed = config.run.seed;
  state.fingerprints = fingerprints;
  state.environment = run::describe_environment(model.device().str());
  state.data_cursor =
      data::BatchStream(config.data.train, config.data, model.vocabulary, uint64_t(config.run.seed)).state();
  checkpoint::CheckpointConfig at_once = config.checkpoint;
  at_once.async = false;
  return checkpoint::CheckpointWriter(dir.checkpoints(), at_once)
      .save(0, checkpoint::parameter_parts(*model.registry), optimizer.state_parts(), checkpoint::to_json(state));
}

// What rank 0 has to say once it has opened or made the run: a checkpoint's path, or why there is none.
constexpr const char* kStart = "start of the run";

fs::path wait_for_rank_0(distributed::World& world, double minutes) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  while (true) {
    if (const auto said = world.look(kStart)) {
      const auto j = io::Json::parse(*said);
      const bool usage = j.value("usage", false);  // every rank ends with the code that rank 0 ends with
      MOEGRAFT_CHECK_USAGE(!usage, "rank 0 could not start the run: ", j.value("error", ""));
      MOEGRAFT_CHECK(!j.contains("error"), "rank 0 could not start the run: ", j.value("error", ""));
      return fs::path(j.at("checkpoint").get<std::string>());
    }
    MOEGRAFT_CHECK(
        Clock::now() - start < std::chrono::duration<double>(60 * minutes), "rank ", world.rank(), " waited ", minutes,
        " minutes for rank 0 to make the run; raise parallel.startup_minutes if its initialisation takes longer");
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

// The least that the device of a process has free; 0 on the CPU. Collective on GPUs.
int64_t free_everywhere(const model::ModelConfig& config, const distributed::Mesh& mesh) {
  const auto mine = model::free_memory(graft::device_of(config.device));
  if (!mine) return 0;
  if (!mesh.distributed()) return *mine;
  double least = double(*mine);
  for (const auto& rank : mesh.world->all().all_gather_numbers({least}, "free memory"))
    least = std::min(least, rank[0]);
  return int64_t(least);
}

}  // namespace

AdamW make_optimizer(model::ParameterRegistry& registry, const TrainConfig& t, std::vector<bool> owned) {
  const auto options = [](const OptimizerGroup& g) { return GroupOptions{g.lr, g.weight_decay}; };
  return AdamW(registry, {{"lora", options(t.lora)}, {"embeddings", options(t.embeddings)}, {"base", options(t.base)}},
               {t.betas[0], t.betas[1], t.adam_epsilon, t.optimizer == OptimizerKind::adamw_8bit}, std::move(owned));
}

std::optional<model::Experts> experts_of_new_run(const run::RunConfig& config, bool on_gpu) {
  if (!graft::initialises_by_running(config.adapters)) return model::Experts::absent;
  const bool visit = config.parallel.expert > 1 || config.parallel.shard_base ||
                     config.model.offload == model::Offload::experts;  // one GPU may not hold the whole base
  if (visit && on_gpu) return model::Experts::mapped;
  return {};
}

void check_layout(const run::RunConfig& config, int64_t world_size) {
  const auto& p = config.parallel;
  MOEGRAFT_CHECK_USAGE(world_size % p.expert == 0, "parallel.expert (", p.expert,
                       ") must divide the number of processes, got ", world_size);
  if (config.model.path.empty()) return;
  const model::DecoderSpec spec = model::read_spec(config.model.path);
  MOEGRAFT_CHECK_USAGE(p.expert == 1 || spec.has_experts(), "parallel.expert must be 1 for ", config.model.path,
                       ", a dense model (", spec.family, "); got ", p.expert);
  MOEGRAFT_CHECK_USAGE(p.expert == 1 || spec.num_experts % p.expert == 0, "parallel.expert (", p.expert,
                       ") must divide the ", spec.num_experts, " experts of ", config.model.path);
  graft::plan_calibration(spec, config);  // throws where its bound is too small
  // Before anything is loaded or made, and so without the new rows, whose number the codecs know.
  planning::MemoryRequest request =
      planning::memory_request(spec, config, {}, graft::device_of(config.model.device), world_size);
  request.free_bytes = model::free_memory(request.device).value_or(0);
  planning::check_fits(planning::plan_memory(request), request);
}

std::vector<distributed::World::Fact> facts_of(const run::RunConfig& config, const std::string& resume) {
  std::vector<distributed::World::Fact> facts;
  const auto environment = run::describe_environment(config::name_of(config.model.device));
  for (const char* name : {"binary", "libtorch"}) facts.push_back({name, environment.at(name)});
  facts.push_back({"--resume", resume});
  for (const auto& [key, value] : run::flat_config(config)) facts.push_back({key, value});
  // What each process reads, by content.
  for (const auto& [name, fingerprint] : run::take_fingerprints(config, run::Parts::all))
    facts.push_back({"the fingerprint of " + name, fingerprint});
  return facts;
}

Start start_run(const run::RunConfig& config, const std::string& resume, const distributed::Mesh& mesh,
                bool accept_data) {
  Start start;
  const bool first = mesh.world->rank() == 0;
  const int64_t free = free_everywhere(config.model, mesh);
  const auto open = [&] {
    check_inputs(config);
    Origin origin = find_origin(config.run.dir, resume);
    start.fingerprints = run::take_fingerprints(config, run::Parts::all);
    if (origin.checkpoint && !origin.branches && !run::RunDir::has_trained(config.run.dir) &&
        !run::RunDir::would_resume(config, start.fingerprints)) {
      log::info(config.run.dir,
                " has trained no step yet, and its config or what it reads has changed: it begins anew");
      origin = {};
    }
    std::vector<std::string> sources;
    for (const auto* list : {&config.data.train, &config.data.eval})
      for (const auto& source : *list) sources.push_back(source.path);
    run::check_shards(sources, start.fingerprints, config);
    if (origin.checkpoint) start.from = checkpoint::load(*origin.checkpoint);
    start.dir.emplace(open_dir(config, resume, origin, start.from, start.fingerprints,
                               graft::device_of(config.model.device).str(), accept_data));
  };
  if (!mesh.distributed()) {
    open();
    start.model = start.from ? graft::assemble_model(config) : graft::build_model(config);
    if (!start.from) write_beside(start.dir->path(), start.model);
  } else {
    if (first) {
      try {
        open();
        if (!start.from) start.from = checkpoint::load(save_new_run(config, *start.dir, start.fingerprints));
        mesh.world->post(kStart, io::Json{{"checkpoint", start.from->dir.string()}}.dump());
      } catch (const std::exception& e) {
        mesh.world->post(
            kStart, io::Json{{"error", e.what()}, {"usage", dynamic_cast<const UsageError*>(&e) != nullptr}}.dump());
        throw;
      }
    } else {
      const fs::path path = wait_for_rank_0(*mesh.world, config.parallel.startup_minutes);
      MOEGRAFT_CHECK(fs::is_directory(path), "rank ", mesh.world->rank(), " does not see the checkpoint ",
                     path.string(), ": run.dir must lie on a file system that all processes share");
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
  planning::MemoryRequest request = planning::memory_request(
      start.model.decoder->spec(), config, start.model.vocabulary, start.model.device(), mesh.world->size());
  request.free_bytes = free;
  start.plan = planning::plan_memory(request);
  start.trained = planning::trained_table(request);
  for (const auto& line : planning::format_trained(start.trained, start.model.decoder->spec().num_parameters()))
    log::info("trains ", line);
  planning::check_fits(start.plan, request);
  log::info(planning::summary(start.plan));
  return start;
}

}  // namespace moegraft::train
