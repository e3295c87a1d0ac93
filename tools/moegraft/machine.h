#pragma once
// What of the machine a command uses: options of the program itself, before the command; of `train` keys of its YAML
// too.

#include <CLI/CLI.hpp>

#include <string>

namespace moegraft::tools {

void add_machine_options(CLI::App& app);  // --cpu-path, --attention, --numa

struct MachineKeys {
  std::string cpu_path = "auto", attention = "auto";  // model.cpu_path, model.attention
  bool numa = true;                                   // parallel.numa
};
// Does as the options say, and where one was not given as the keys say. Once, before memory is touched and threads are
// made. UsageError: what the machine has not.
void choose_machine(const CLI::App& app, const MachineKeys& keys = {});

// UsageError: one of the options before `launch`, which hands them to nobody.
void check_launched(const CLI::App& app);

// UsageError: a variable of the environment that was read once and is an option now.
void refuse_old_variables();

}  // namespace moegraft::tools
