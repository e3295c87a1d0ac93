#include "format.h"

#include "libtorch.h"

#include <algorithm>
#include <cstdio>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

constexpr const char* kFormat = "moegraft checkpoint";
constexpr const char* kSlices = "slices";  // of a file's metadata

const char* kind_name(Kind kind) { return kind == Kind::adapter ? "adapter" : "optimizer"; }

std::string hex(uint64_t value) {
  char text[17];
  snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

io::Json to_json(const std::map<std::string, Slice>& slices) {
  io::Json json = io::Json::object();
  for (const auto& [name, slice] : slices) json[name] = {{"first", slice.first}, {"total", slice.total}};
  return json;
}

std::map<std::string, Slice> slices_of(const io::Json& json) {
  std::map<std::string, Slice> slices;
  for (const auto& [name, slice] : json.items())
    slices[name] = {slice.at("first").get<int64_t>(), slice.at("total").get<int64_t>()};
  return slices;
}

}  // namespace

std::string tensor_file(Kind kind, int64_t rank, int64_t world_size) {
  char text[64] = "";
  if (world_size > 1)
    snprintf(text, sizeof text, "-%05lld-of-%05lld", static_cast<long long>(rank), static_cast<long long>(world_size));
  return std::string(kind_name(kind)) + text + ".safetensors";
}

FileEntry describe_file(const fs::path& path) { return {fs::file_size(path), hex(io::checksum_file(path)), {}}; }

void write_manifest(const fs::path& dir, const Manifest& manifest) {
  io::Json files = io::Json::object();
  for (const auto& [name, entry] : manifest.files) {
    files[name] = {{"size", entry.size}, {"checksum", entry.checksum}};
    if (!entry.slices.empty()) files[name]["slices"] = to_json(entry.slices);
  }
  io::Json json = {{"format", kFormat},
                   {"version", manifest.world_size > 1 ? 2 : 1},
                   {"step", manifest.step},
                   {"measure", nullptr},
                   {"files", files}};
  if (manifest.measure) json["measure"] = *manifest.measure;
  if (manifest.world_size > 1) json["world_size"] = manifest.world_size;
  json["checksum"] = io::checksum_hex(json.dump());
  io::write_json(dir / kManifest, json);
}

Manifest read_manifest(const fs::path& dir) {
  try {
    auto json = io::read_json(dir / kManifest);
    const auto own = json.at("checksum").get<std::string>();
    json.erase("checksum");
    MOEGRAFT_CHECK(io::checksum_hex(json.dump()) == own, kManifest, ": its own checksum differs");
    const auto version = json.at("version").get<int64_t>();
    MOEGRAFT_CHECK(json.at("format") == kFormat && (version == 1 || version == 2), kManifest,
                   ": not a moegraft checkpoint of version 1 or 2");
    Manifest manifest;
    manifest.step = json.at("step").get<int64_t>();
    if (!json.at("measure").is_null()) manifest.measure = json.at("measure").get<double>();
    if (version == 2) manifest.world_size = json.at("world_size").get<int64_t>();
    for (const auto& [name, entry] : json.at("files").items()) {
      MOEGRAFT_CHECK(fs::path(name).filename() == name, kManifest, ": ", name, " is not the name of a file beside it");
      auto& file =
          manifest.files[name] = {entry.at("size").get<uint64_t>(), entry.at("checksum").get<std::string>(), {}};
      if (entry.contains("slices")) file.slices = slices_of(entry.at("slices"));
    }
    std::vector<std::string> required = {kState};
    if (version == 1)
      required.insert(required.end(), {tensor_file(Kind::adapter, 0, 1), tensor_file(Kind::optimizer, 0, 1)});
    for (const auto& name : required)
      MOEGRAFT_CHECK(manifest.files.contains(name), kManifest, ": it does not list ", name);
    return manifest;
  } catch (const io::Json::exception& e) { fail<UserError>(kManifest, " does not read as a manifest: ", e.what()); }
}

std::optional<double> recorded_measure(const fs::path& dir) {
  try {
    return read_manifest(dir).measure;
  } catch (const std::exception&) { return {}; }
}

std::map<std::string, std::string> slice_metadata(const std::map<std::string, Slice>& slices) {
  if (slices.empty()) return {};
  return {{kSlices, to_json(slices).dump()}};
}

std::map<std::string, Slice> read_slices(const fs::path& file) {
  const io::SafetensorsFile opened(file);
  const auto found = opened.metadata().find(kSlices);
  if (found == opened.metadata().end()) return {};
  try {
    return slices_of(io::Json::parse(found->second));
  } catch (const io::Json::exception& e) {
    fail<UserError>(file.string(), ": its list of slices does not read: ", e.what());
  }
}

Assembly::Assembly(const fs::path& dir, const Manifest& manifest, Kind kind) {
  for (const auto& [file_name, entry] : manifest.files) {
    if (!file_name.starts_with(kind_name(kind))) continue;
    const auto& file = files_.emplace_back(dir / file_name);
    names_.push_back(file_name);
    for (const auto& [name, slice] : entry.slices)
      MOEGRAFT_CHECK(file.contains(name), file_name, " has no tensor ", name, ", of which ", kManifest,
                     " names a slice");
    for (const auto& name : file.names()) {
      Piece piece{files_.size() - 1, 0, 0, 0};
      if (const auto slice = entry.slices.find(name); slice != entry.slices.end()) {
        const auto shape = file.shape(name);
        const auto [first, total] = slice->second;
        const int64_t rows = shape.empty() ? -1 : shape[0];
        MOEGRAFT_CHECK(rows >= 0 && total > 0 && first >= 0 && first <= total && rows <= total - first, file_name,
                       ": rows ", first, " to ", first, " + ", rows, " of ", name, " do not lie in its ", total,
                       " rows");
        piece = {piece.file, first, rows, total};
      }
      pieces_[name].push_back(piece);
    }
  }
  for (auto& [name, pieces] : pieces_) {
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
      return std::pair(a.first, a.rows) < std::pair(b.first, b.rows);
    });
    check(name, pieces);
  }
}

void Assembly::check(const std::string& name, const std::vector<Piece>& pieces) const {
  const Piece& head = pieces[0];
  if (head.total == 0 && pieces.size() == 1) return;
  const auto shape_beyond_rows = [&](const Piece& piece) {
    auto shape = files_[piece.file].shape(name);
    if (!shape.empty()) shape[0] = 0;
    return shape;
  };
  int64_t next = 0;
  const Piece* before = nullptr;
  for (const auto& piece : pieces) {
    const auto& file = names_[piece.file];
    MOEGRAFT_CHECK(piece.total != 0 && head.total != 0, "the whole tensor ", name, " is in ", names_[pieces[0].file],
                   " and again in ", names_[pieces[1].file]);
    MOEGRAFT_CHECK(piece.total == head.total, name, " has ", head.total, " rows in ", names_[head.file], ", but ",
                   piece.total, " in ", file);
    MOEGRAFT_CHECK(shape_beyond_rows(piece) == shape_beyond_rows(head) &&
                       files_[piece.file].dtype(name) == files_[head.file].dtype(name),
                   "the slices of ", name, " in ", names_[head.file], " and ", file, " differ in shape or dtype");
    MOEGRAFT_CHECK(piece.first <= next, "rows ", next, " to ", piece.first - 1, " of ", name, " are in no file");
    MOEGRAFT_CHECK(piece.first == next, "rows ", piece.first, " to ", std::min(next, piece.first + piece.rows) - 1,
                   " of ", name, " are in ", before ? names_[before->file] : file, " and again in ", file);
    next = piece.first + piece.rows;
    before = &piece;
  }
  MOEGRAFT_CHECK(next == head.total, "rows ", next, " to ", head.total - 1, " of ", name, " are in no file");
}

io::TensorMap Assembly::tensors() const {
  io::TensorMap tensors;
  for (const auto& [name, pieces] : pieces_) {
    if (pieces.size() == 1) {
      tensors[name] = files_[pieces[0].file].tensor(name);
      continue;
    }
    auto shape = files_[pieces[0].file].shape(name);
    shape[0] = pieces[0].total;
    const at::Tensor joined = at::empty(shape, files_[pieces[0].file].dtype(name));
    for (const auto& piece : pieces) {
      const at::Tensor slice = files_[piece.file].tensor(name);
      joined.narrow(0, piece.first, piece.rows).copy_(slice);
      files_[piece.file].release_pages(slice);
    }
    tensors[name] = joined;
  }
  return tensors;
}

}  // namespace moegraft::checkpoint
