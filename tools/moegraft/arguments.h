#pragma once
// What the arguments of all commands have in common.

#include <CLI/CLI.hpp>
#include <string>

namespace moegraft::tools {

// ~, $NAME and ${NAME} in every option that names a file or folder (config::expand_path). After all commands are added.
void expand_paths(CLI::App& app);

// One line about the first word of a failed command line that no command or option knows, with the nearest that one
// does; empty when all are known.
std::string unknown_word(const CLI::App& app);

// "moegraft data prepare".
std::string called_command(const CLI::App& app);

// One line about an argument that is missing because an option of several values took it; empty when that is not the
// fault.
std::string taken_argument(const CLI::App& app);

}  // namespace moegraft::tools
