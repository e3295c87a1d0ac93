#pragma once
// The JSON files and the README of a PEFT export.

#include "moegraft/exporting/peft.h"
#include "moegraft/io/json.h"
#include "peft_layout.h"

namespace moegraft::exporting {

// The one scale alpha/r of the export: the largest of the adapters'; pack() folds the others into B.
double common_scale(const std::vector<Target>& targets);

// PEFT's LoraConfig. Every rank keeps alpha/rank = scale, so a reader that ignores the patterns scales right too.
io::Json adapter_config(const graft::GraftedModel& model, const std::vector<Target>& targets,
                        const std::string& base_name);

// What PEFT has no word for: the gate, the new ids, which ranks belong to which adapter and site.
io::Json gating_marker(const graft::GraftedModel& model, const std::vector<Target>& targets,
                       const std::string& base_name);

std::string readme(const graft::GraftedModel& model, const std::string& base_name);

}  // namespace moegraft::exporting
