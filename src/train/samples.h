#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "moegraft/graft/grafted_model.h"

namespace moegraft::train {

// Draws one picture a prompt and writes a contact sheet samples/step-00000100.png. Returns its path; empty when nothing
// was drawn, or dir is.
std::filesystem::path write_samples(graft::GraftedModel& model, const std::vector<std::string>& prompts,
                                    const std::filesystem::path& dir, int64_t step, uint64_t seed);

}  // namespace moegraft::train
