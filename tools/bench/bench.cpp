// moegraft bench: how fast, in how much memory, and how close to what this machine can do.
#include "bench.h"

#include "command.h"
#include "moegraft/base/check.h"

namespace moegraft::tools {

void add_bench_command(CLI::App& app) {
  CLI::App* cmd = app.add_subcommand("bench",
                                     "Time training steps, single operations, collectives, generation, growth, "
                                     "captions and contention; without a kind: step");
  cmd->require_subcommand(0, 1);
  const auto run_step = bench::add_step_options(*cmd);
  CLI::App* step = cmd->add_subcommand("step", "A whole training step: forward, loss, backward, optimizer");
  step->callback(bench::add_step_options(*step));
  bench::add_ops_command(*cmd);
  bench::add_collectives_command(*cmd);
  bench::add_generate_command(*cmd);
  bench::add_growth_command(*cmd);
  bench::add_captions_command(*cmd);
  bench::add_contention_command(*cmd);
  cmd->callback([cmd, run_step] {
    if (cmd->get_subcommands().empty()) run_step();
  });
  // The step's options stand on `bench` too, where another kind would silently ignore them.
  for (CLI::App* kind : cmd->get_subcommands({}))
    kind->preparse_callback([cmd, kind](size_t) {
      for (const CLI::Option* option : cmd->get_options())
        MOEGRAFT_CHECK_USAGE(option->count() == 0, "bench: ", option->get_name(), " stands before ", kind->get_name(),
                             "; options belong behind it: moegraft bench ", kind->get_name(), " …");
    });
}

}  // namespace moegraft::tools
