#pragma once
// A grafted model as a PEFT adapter directory that transformers + PEFT load:
//   adapter_config.json  adapter_model.safetensors  moegraft.json (what PEFT cannot express)  vocabulary.json README.md
// PEFT's terms act on every token: what plain PEFT computes equals the run with its gate opened for all tokens
// (model::Gate::all).

#include <filesystem>
#include <string>
#include <vector>

#include "moegraft/graft/grafted_model.h"

namespace moegraft::exporting {

struct PeftOptions {
  std::filesystem::path output;
  std::string base_name;   // base_model_name_or_path; empty: the path the run has its base from
  bool overwrite = false;  // replaces an earlier export; any other folder is refused
};

// One adapted weight of one layer, measured on the files as they were written.
struct TargetReport {
  std::string path;              // "model.layers.3.mlp.experts.gate_up_proj"
  int64_t rank = 0;              // in PEFT's terms: the sum over adapters and fused sites
  double relative_error = 0;     // |delta read back - delta of the run| / |delta of the run|, largest over experts
  std::vector<int64_t> nonzero;  // elements of B*A's factors that are not 0, per expert (one entry for attention)
  std::vector<int64_t> silent_experts;  // experts whose delta is 0, in the run as in the export
};

struct PeftReport {
  std::filesystem::path output;
  int64_t tensors = 0, bytes = 0, new_rows = 0;
  double relative_error = 0;  // largest over targets
  int64_t silent_experts = 0, experts = 0;
  std::vector<TargetReport> targets;
  std::string to_json() const;
};

// Writes the directory under a temporary name beside `output`, reads it back (verify_peft) and renames it; on any
// failure nothing is left behind. Every adapter of the run is merged into one by concatenating ranks. UsageError:
// `output` exists, its parent does not, the model has no adapter. UserError: a family whose tensor names are not known,
// a full disk, a mismatch.
PeftReport export_peft(const graft::GraftedModel& model, const PeftOptions& options);

// Reads an export as PEFT would (targets, ranks and scales from adapter_config.json, layouts of FORMATS) and compares
// the action of every delta and every new row with the model's. UserError names the first tensor that is missing,
// superfluous, of a wrong shape or off by more than 1e-7 of its norm.
PeftReport verify_peft(const graft::GraftedModel& model, const std::filesystem::path& dir);

}  // namespace moegraft::exporting
