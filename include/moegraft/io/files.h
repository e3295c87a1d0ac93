#pragma once
// Whole-file helpers. Writes are atomic: temporary name in the same folder, fsync, rename, fsync of the folder.

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace moegraft::io {

std::string read_file(
    const std::filesystem::path& path);  // UserError: missing or unreadable, with the path and the reason
void write_file_atomic(const std::filesystem::path& path, std::string_view bytes);
void sync_directory(const std::filesystem::path& dir);  // fsync of a folder's entries
void sync_file(const std::filesystem::path& path);
uint64_t checksum_file(const std::filesystem::path& path);  // xxh64-like or CRC: see files.cpp; stable across versions
std::string checksum_hex(std::string_view bytes);

}  // namespace moegraft::io
