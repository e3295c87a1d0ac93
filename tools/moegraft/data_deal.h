#pragma once

#include <CLI/CLI.hpp>

namespace moegraft::tools {

void add_deal(CLI::App& data);  // moegraft data deal

}  // namespace moegraft::tools
