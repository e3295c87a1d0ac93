// moegraft export: a run's adapter in another project's format.
#include <cstdio>
#include <iostream>
#include <memory>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/exporting/peft.h"
#include "moegraft/run/run_dir.h"

namespace moegraft::tools {
namespace {

struct Options {
  std::string run, format = "peft", checkpoint = "latest";
  exporting::PeftOptions peft;
  bool json = false;
};

void check_format(const std::string& format) {
  if (format == "peft") return;
  for (const char* planned : {"peft-per-expert", "hf", "hf-merged"})
    if (format == planned) fail<UsageError>("--format ", format, " does not exist yet; formats: peft");
  fail<UsageError>("--format must be peft, got '", format, "'");
}

void run(const Options& o) {
  check_format(o.format);
  MOEGRAFT_CHECK_USAGE(run::is_run(o.run), o.run,
                       " is not a run (it has no config.yaml); export takes a run directory");
  graft::OpenOptions open;
  open.dtype = at::kFloat;
  open.device = config::Device::cpu;
  open.checkpoint = o.checkpoint;
  open.with_codecs = false;
  const graft::GraftedModel model = graft::open_model(o.run, open);
  const exporting::PeftReport report = exporting::export_peft(model, o.peft);
  char error[32];
  std::snprintf(error, sizeof error, "%.1e", report.relative_error);
  log::info("wrote ", report.output.string(), " from step ", model.step, ": ", report.tensors, " tensors, ",
            report.bytes, " bytes, ", report.new_rows, " new tokens");
  log::info("read back: ", report.targets.size(), " deltas equal the run's (largest relative error ", error, "), ",
            report.experts - report.silent_experts, " of ", report.experts, " expert deltas are not zero");
  log::info("the gate is in moegraft.json only: plain PEFT applies the adapter to every token (see README.md there)");
  if (o.json) std::cout << report.to_json() << "\n";
}

}  // namespace

void add_export_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* cmd = app.add_subcommand(
      "export", "Write a run's adapter for other programs, and verify the files by reading them back");
  cmd->add_option("run", o->run, "Run directory")->required();
  cmd->add_option("--format", o->format,
                  "peft: adapter_config.json + adapter_model.safetensors for transformers and PEFT")
      ->capture_default_str();
  cmd->add_option("-o,--output", o->peft.output, "Folder to write; it must not exist")->required();
  cmd->add_option("--checkpoint", o->checkpoint, "latest, best, a step or a directory")->capture_default_str();
  cmd->add_option("--base-name", o->peft.base_name,
                  "base_model_name_or_path in the export (default: where the run has its base from)");
  cmd->add_flag("--overwrite", o->peft.overwrite, "Replace an earlier export");
  cmd->add_flag("--json", o->json, "Print the report as one JSON object");
  cmd->footer("Example: moegraft export runs/quickstart/graft --format peft -o runs/quickstart/peft --json");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools
