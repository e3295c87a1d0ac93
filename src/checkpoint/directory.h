#pragma once
// Renames and removals of checkpoint directories.

#include <filesystem>
#include <optional>

namespace moegraft::checkpoint {

// Names that only a writer at work uses; the next writer removes them.
constexpr const char* kWriting = ".writing-";
constexpr const char* kRemoving = ".removing-";

std::optional<int64_t> step_of(const std::filesystem::path& dir);  // none: not a checkpoint's name
void set_aside(const std::filesystem::path& dir);                  // to a name that no longer lists it
void remove_checkpoint(const std::filesystem::path& dir);
void move_into_place(const std::filesystem::path& fresh, const std::filesystem::path& target);  // the target may exist
void remove_leftovers(const std::filesystem::path& root);
// All but the newest `keep` and, with keep_best, the best measured one.
void remove_old(const std::filesystem::path& root, int64_t keep, bool keep_best, bool lower_is_better);

inline bool is_better(double a, double b, bool lower_is_better) { return lower_is_better ? a < b : a > b; }

}  // namespace moegraft::checkpoint
