#pragma once
// Which content a file has, cheaply enough to ask at every start: what a run was trained on is compared with what is
// there now.

#include <filesystem>
#include <string>
#include <vector>

namespace moegraft::io {

// 16 hex digits. Up to 16 MiB the whole content counts. Of a larger safetensors file its size, its header, 4 KiB at its
// ends and out of the middle of every tensor (at most 65,536 of them), and as much of each further 4 MiB of a tensor
// (of files above 32 GiB: of each 8,192nd part): other weights, another order or another training step show, one expert
// among stacked ones too; a change that lies between these pages is missed. Of any other large file 4,096 pages of 4
// KiB at even distances. Reads at most about 300 MiB of any file. UserError when it cannot be read.
std::string fingerprint_file(const std::filesystem::path& path);

// Of several files: their names (without folders) and contents, in the order of names. Empty when there is none.
std::string fingerprint_files(std::vector<std::filesystem::path> files);

// Of the files of a folder whose names `counts` accepts (subfolders do not), or of the file that `path` is.
std::string fingerprint_folder(const std::filesystem::path& path, bool (*counts)(const std::string& name));

}  // namespace moegraft::io
