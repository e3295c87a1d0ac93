#pragma once
// Which files a name stands for: braces, splits, what save_to_disk lists.

#include <filesystem>
#include <string>
#include <vector>

namespace moegraft::io {

// "x-{000..123}.tar" and "{a,b}.tar" as WebDataset's users write them (braceexpand: the shell's rules), nested too;
// every file must be there. A path without braces, or that exists as it is, stands for itself.
std::vector<std::filesystem::path> expand_braces(const std::filesystem::path& path);

// UserError where the names of a folder's files tell several splits (train, validation, test, …): together they are no
// data set.
void check_one_split(const std::filesystem::path& folder, const std::vector<std::filesystem::path>& files);

// UserError where files of a folder are numbered as the hub does it ("train-00000-of-00002.parquet") and one of them is
// not among these.
void check_numbering(const std::vector<std::filesystem::path>& files);

// Hugging Face's save_to_disk: the files of a data set in their order (state.json), the names of the splits of several
// (dataset_dict.json).
std::vector<std::filesystem::path> files_of_state(const std::filesystem::path& folder);
std::vector<std::string> splits_of_dict(const std::filesystem::path& folder);

}  // namespace moegraft::io
