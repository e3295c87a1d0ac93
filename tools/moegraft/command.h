#pragma once
// One file per subcommand: it adds itself to the app; its callback throws UserError (exit 1) or UsageError (exit 2).

#include <CLI/CLI.hpp>

namespace moegraft::tools {

void add_train_command(CLI::App& app);
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

// `launch --nproc 2 train -c x` as `launch --nproc 2 -- train -c x`: CLI11 would read the command's options as launch's.
std::vector<std::string> separate_launched(std::vector<std::string> arguments);

// Checks of an option's number: CLI11's own name the largest double in 310 digits.
CLI::Validator positive();
CLI::Validator not_negative();

}  // namespace moegraft::tools
