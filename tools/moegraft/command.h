#pragma once
// One file per subcommand: it adds itself to the app; its callback throws UserError (exit 1) or UsageError (exit 2).

#include <CLI/CLI.hpp>

#include <string>
#include <vector>

namespace moegraft::tools {

void add_train_command(CLI::App& app);
void add_config_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_export_command(CLI::App& app);
void add_inspect_command(CLI::App& app);
void add_logits_command(CLI::App& app);
void add_tokenize_command(CLI::App& app);
void add_codec_command(CLI::App& app);
void add_data_command(CLI::App& app);
void add_ot_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_summary_command(CLI::App& app);
void add_launch_command(CLI::App& app);
void add_import_command(CLI::App& app);
void add_upcycle_command(CLI::App& app);

// app.parse() of all commands; what `launch` starts may stand behind -- or without it.
void parse(CLI::App& app, int argc, char** argv);

// Checks of an option's number: CLI11's own name the largest double in 310 digits.
CLI::Validator positive();
CLI::Validator not_negative();

// UsageError when `file` exists and is no safetensors file of the first of `tensors`, with or without the others:
// something else is not replaced.
void check_tensor_output(const std::string& file, const std::vector<std::string>& tensors);

}  // namespace moegraft::tools
