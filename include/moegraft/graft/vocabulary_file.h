#pragma once
// vocabulary.json of a run: the token ids of its modalities, so that a run opens without its codecs.

#include <filesystem>
#include <optional>

#include "moegraft/model/vocabulary.h"

namespace moegraft::graft {

void write_vocabulary(const std::filesystem::path& run_dir, const model::Vocabulary& vocabulary);
std::optional<model::Vocabulary> read_vocabulary(
    const std::filesystem::path& run_dir);  // none when the file does not exist

}  // namespace moegraft::graft
