#include "moegraft/train/trainer.h"

#include "libtorch.h"

#include <chrono>
#include <exception>
#include <filesystem>
#include <optional>

#include "moegraft/base/log.h"
#include "moegraft/io/files.h"
#include "moegraft/model/weights.h"
#include "session.h"
#include "stage.h"
#include "startup.h"
#include "train_loop.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;

// A base that trained, as a Hugging Face model with the files of its tokenizer.
void export_base(const run::RunConfig& config, graft::GraftedModel& model, const fs::path& to) {
  model::save_base(model.decoder->base(), to, at::kFloat);
  for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                           "added_tokens.json", "chat_template.jinja"}) {
    const fs::path from = fs::path(config.model.init ? config.model.init->tokenizer : config.model.path) / name;
    if (fs::exists(from)) io::write_file_atomic(to / name, io::read_file(from));
  }
  log::info("wrote ", to.string(), ": a Hugging Face model");
}

// A session of one stage.
TrainOutcome run_session(const run::RunConfig& config, Start start, const distributed::Mesh& mesh) {
  Stage stage(config, start.model, mesh);
  Session session(config, start, mesh);
  if (start.from) {
    stage.restore(*start.from, session.state().data_cursor, session.data_changed());
    session.set_aside_newer_checkpoints();
    start.from.reset();  // its tensors have been taken
  }
  session.run_log().note_trainable(start.trained);
  const TrainOutcome outcome = TrainLoop(config, stage, session, start.plan.recompute_layers).run();
  const bool finished = !outcome.stopped && !outcome.ended_before;
  if (finished && session.run_log().writes() && start.model.decoder->base().weights->trainable())
    export_base(config, start.model, session.dir() / "model");
  return outcome;
}

}  // namespace

void resolve_paths(run::RunConfig& config) {
  const auto absolute = [](std::string& path) {
    if (!path.empty()) path = fs::absolute(path).lexically_normal().string();
  };
  absolute(config.run.dir);
  absolute(config.model.path);
  if (config.model.init) absolute(config.model.init->tokenizer);
  for (auto& [name, modality] : config.modalities) absolute(modality.codec);
  for (auto& adapter : config.adapters) absolute(adapter.init_from);
  for (auto* sources : {&config.data.train, &config.data.eval})
    for (auto& source : *sources) absolute(source.path);
}

TrainOutcome train(const run::RunConfig& config_in, const std::string& resume,
                   std::shared_ptr<distributed::World> world, bool accept_data) {
  run::RunConfig config = config_in;
  resolve_paths(config);
  if (!world) world = distributed::World::join({});
  check_layout(config, world->size());
  const distributed::Mesh mesh = distributed::make_mesh(world, config.parallel.expert);
  try {
    return run_session(config, start_run(config, resume, mesh, accept_data), mesh);
  } catch (const std::exception& e) {
    world->announce_failure(e.what());
    throw;
  }
}

TrainOutcome train_together(const distributed::LaunchEnvironment& environment,
                            const std::function<run::RunConfig()>& read_config, const std::string& resume,
                            bool accept_data) {
  std::optional<run::RunConfig> config;
  std::vector<distributed::World::Fact> facts;
  std::optional<std::string> error;
  std::exception_ptr failure;
  distributed::WorldOptions options;
  try {  // all that one process can find wrong by itself, so that the others learn of it instead of waiting
    config = read_config();
    resolve_paths(*config);
    options.device = graft::choose_device(config->model.device, environment.local_rank, environment.local_world_size);
    options.timeout = std::chrono::milliseconds(int64_t(1000 * config->parallel.timeout_seconds));
    check_layout(*config, environment.world_size);
    facts = facts_of(*config, resume);
  } catch (const std::exception& e) {
    failure = std::current_exception();
    error = e.what();
  }
  const auto world = distributed::World::join(environment, options);
  try {
    world->agree(facts, error);
  } catch (const std::exception&) {
    if (failure) std::rethrow_exception(failure);
    throw;
  }
  return train(*config, resume, world, accept_data);
}

}  // namespace moegraft::train
