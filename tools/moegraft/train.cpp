// moegraft train: the loop, from a YAML file.
#include <exception>
#include <memory>
#include <optional>

#include "command.h"
#include "machine.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/config/config.h"
#include "moegraft/run/run_config.h"
#include "moegraft/run/signals.h"
#include "moegraft/train/trainer.h"

namespace moegraft::tools {
namespace {

struct Options {
  std::string config, resume = "none";
  std::vector<std::string> set, accept_changed;
};

}  // namespace

void add_train_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* cmd = app.add_subcommand("train", "Train: a base from scratch, or a new modality grafted onto a base");
  cmd->add_flag_callback("--keys",
                         [] { fail<UsageError>("--keys is now a command: moegraft config train prints every key"); })
      ->group("");
  cmd->add_option("-c,--config", o->config, "YAML file of the run; moegraft config train lists its keys")->required();
  cmd->add_option("--set", o->set, "Override a key: train.steps=200 (repeatable)")->take_all()->allow_extra_args(false);
  cmd->add_option("--resume", o->resume,
                  "none: a new run; auto: continue when there is one; or a checkpoint directory: of another run, a new "
                  "run.dir branches from it")
      ->capture_default_str();
  cmd->add_option("--accept-changed", o->accept_changed,
                  "data: go on although a data set is not the one that the run was trained on")
      ->check(CLI::IsMember({"data"}));
  cmd->footer(
      "Example: moegraft train -c configs/quickstart/graft.yaml --set train.steps=200 --resume auto\n"
      "Exit codes: 0 finished, 1 failed, 2 bad usage or config, 3 stopped by a signal with everything saved.");
  cmd->callback([o, &app] {
    MOEGRAFT_CHECK_USAGE(!o->resume.empty(),
                         "--resume is empty: give none, auto or a checkpoint directory (a variable that is not set?)");
    std::optional<run::RunConfig> config;
    const auto read = [&] {
      if (!config) config = config::parse<run::RunConfig>(config::Document::from_file(o->config, o->set));
      return *config;
    };
    const run::StartSignals signals;
    const bool accept_data = !o->accept_changed.empty();
    const auto environment = distributed::read_launch_environment();
    if (environment.distributed()) log::set_rank(environment.rank);
    try {
      read();
    } catch (const std::exception&) {
      // Said below, by all processes together.
    }
    if (config) choose_machine(app, {config->model.cpu_path, config->model.attention, config->parallel.numa});
    const auto outcome = environment.distributed() ? train::train_together(environment, read, o->resume, accept_data)
                                                   : train::train(read(), o->resume, nullptr, accept_data);
    if (outcome.stopped) throw CLI::RuntimeError(run::kExitStopped);
    if (!outcome.ended_before) log::info("finished after step ", outcome.step, ", loss ", outcome.loss);
  });
}

}  // namespace moegraft::tools
