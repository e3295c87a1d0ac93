#include "moegraft/data/shard.h"

#include <algorithm>
#include <charconv>
#include <cstdio>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/codec/code_shape.h"

namespace moegraft::data {
namespace {

constexpr const char* kFormat = "moegraft.shard";
constexpr const char *kVersion = "1", *kPlace = "shard", *kCount = "shards", *kFingerprint = "fingerprint.",
                     *kSkipped = "counts.";

std::string metadata_value(const io::SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  MOEGRAFT_CHECK(found != file.metadata().end(), file.path().string(), ": metadata \"", key,
                 "\" is missing (the schema of a shard is in include/moegraft/data/shard.h)");
  return found->second;
}

int64_t metadata_number(const io::SafetensorsFile& file, const std::string& key, int64_t least) {
  const std::string text = metadata_value(file, key);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  MOEGRAFT_CHECK(error == std::errc() && end == text.data() + text.size() && value >= least && value <= INT32_MAX,
                 file.path().string(), ": metadata \"", key, "\" must be ", least > 0 ? "a positive" : "an",
                 " integer, got \"", text, "\"");
  return value;
}

int64_t metadata_count(const io::SafetensorsFile& file, const std::string& key) {
  return metadata_number(file, key, 1);
}

// Why a modality's sizes do not agree; empty when they do.
std::string find_mismatch(const ModalitySchema& m) {
  if (m.codebooks < 1 || m.num_codes % m.codebooks != 0 || m.item_length % m.codebooks != 0)
    return detail::concat(m.codebooks, " codebooks of ", m.name, " must divide its ", m.num_codes,
                          " codes and its item length ", m.item_length);
  const codec::CodeShape shape{m.positions, m.codebooks};
  if (!m.positions.empty() && shape.item_length() != m.item_length)
    return detail::concat(codec::format_positions(m.positions), " positions of ", m.name, " with ", m.codebooks,
                          " codebook(s) make items of ", shape.item_length(), " codes, its item length is ",
                          m.item_length);
  return "";
}

ModalitySchema read_modality(const io::SafetensorsFile& file, const std::string& name) {
  ModalitySchema m{name, metadata_count(file, "codes_" + name), metadata_count(file, "item_length_" + name)};
  if (file.metadata().contains("codebooks_" + name)) m.codebooks = metadata_count(file, "codebooks_" + name);
  if (const std::string key = "positions_" + name; file.metadata().contains(key)) {
    m.positions = codec::parse_positions(metadata_value(file, key));
    MOEGRAFT_CHECK(!m.positions.empty(), file.path().string(), ": metadata \"", key,
                   "\" must be like \"6x4\" (rows x columns) or \"75\", got \"", metadata_value(file, key), "\"");
  }
  const std::string mismatch = find_mismatch(m);
  MOEGRAFT_CHECK(mismatch.empty(), file.path().string(), ": ", mismatch);
  return m;
}

Schema read_schema(const io::SafetensorsFile& file) {
  const auto format = file.metadata().find("format");
  MOEGRAFT_CHECK(format != file.metadata().end() && format->second == kFormat, file.path().string(),
                 " is not a shard: metadata \"format\" must be \"", kFormat, "\", got \"",
                 format == file.metadata().end() ? "" : format->second,
                 "\" (make one with `moegraft data prepare shards`)");
  const std::string version = metadata_value(file, "version");
  MOEGRAFT_CHECK(version == kVersion, file.path().string(), ": shard version must be \"", kVersion, "\", got \"",
                 version, "\"");
  Schema schema;
  for (const auto& part : split(metadata_value(file, "modalities"), ',')) {
    const std::string name = trim(part);
    MOEGRAFT_CHECK(schema.modalities.empty() == (name == "text"), file.path().string(),
                   ": metadata \"modalities\" must be \"text\", then the others, got \"",
                   metadata_value(file, "modalities"), "\"");
    if (name == "text")
      schema.modalities.push_back({name, metadata_count(file, "text_vocab"), 0});
    else
      schema.modalities.push_back(read_modality(file, name));
  }
  return schema;
}

// The ids that may stand at a place of a run, from its first place on: of text any, of codes those of one codebook. A
// run begins with an item, and items are whole positions.
class Allowed {
 public:
  explicit Allowed(const ModalitySchema& of) : size_(of.num_codes / of.codebooks), num_codes_(of.num_codes) {}
  bool holds(int64_t id) const { return id >= first_ && id < first_ + size_; }
  void next_place() { first_ = first_ + size_ < num_codes_ ? first_ + size_ : 0; }
  std::string text() const {
    return detail::concat(
        "[", first_, ", ", first_ + size_, ")",
        size_ < num_codes_ ? detail::concat(", codebook ", first_ / size_, " of ", num_codes_ / size_) : "");
  }

 private:
  int64_t size_, num_codes_, first_ = 0;
};

// Documents or items begin at [0, offsets..., last].
void check_offsets(const io::SafetensorsFile& file, const char* name, const at::Tensor& tensor, int64_t last,
                   const char* what) {
  const int64_t n = tensor.numel() - 1;
  MOEGRAFT_CHECK(n >= 0, file.path().string(), ": \"", name, "\" must have one entry more than there are ", what,
                 "s, got none");
  const auto* offsets = tensor.const_data_ptr<int64_t>();
  MOEGRAFT_CHECK(offsets[0] == 0 && offsets[n] == last, file.path().string(), ": \"", name, "\" must go from 0 to ",
                 last, ", got ", offsets[0], " to ", offsets[n]);
  for (int64_t i = 0; i < n; ++i)
    MOEGRAFT_CHECK(offsets[i] < offsets[i + 1], file.path().string(), ": \"", name, "\" must rise, but ", what, " ", i,
                   " is [", offsets[i], ", ", offsets[i + 1], ")");
}

at::Tensor checked_tensor(const io::SafetensorsFile& file, const std::string& name, at::ScalarType dtype) {
  const auto tensor = file.tensor(name);
  MOEGRAFT_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 1, file.path().string(), ": tensor \"", name,
                 "\" must be ", c10::toString(dtype), " with one dimension, got ", c10::toString(tensor.scalar_type()),
                 " with ", tensor.dim());
  if (!file.is_view(name))
    log::warning(
        file.path().string(), ": tensor \"", name, "\" is not aligned to its item size, so its ", tensor.nbytes() >> 20,
        " MiB are read into memory instead of being mapped (write wide types first, as the safetensors package does)");
  return tensor;
}

bool is_shard(const std::filesystem::path& path) {
  if (path.extension() != ".safetensors") return false;
  try {
    const io::SafetensorsFile file(path);
    const auto format = file.metadata().find("format");
    return format != file.metadata().end() && format->second == kFormat;
  } catch (const UserError&) { return false; }
}

}  // namespace

ShardSet::ShardSet(const std::filesystem::path& path) : path_(path) {
  MOEGRAFT_CHECK(std::filesystem::exists(path), "data source not found: ", path.string(),
                 " (make it with `moegraft data prepare shards`)");
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(path)) {
    for (const auto& item : std::filesystem::directory_iterator(path))
      if (item.path().extension() == ".safetensors") files.push_back(item.path());
    std::sort(files.begin(), files.end());
    MOEGRAFT_CHECK(!files.empty(), "data source ", path.string(), " holds no shard (*.safetensors)");
  } else {
    files.push_back(path);
  }
  for (const auto& file : files) {
    MOEGRAFT_CHECK(file.extension() != ".jsonl" && file.extension() != ".json" && file.extension() != ".csv" &&
                       file.extension() != ".txt",
                   "data source ", file.string(), " is not a shard: make shards of it with moegraft data prepare ",
                   file.extension() == ".txt" ? "text" : "shards --manifest");
    open(file);
  }
  check_whole();
  MOEGRAFT_CHECK(num_documents_ > 0, "data source ", path.string(), " is empty: it has no document");
}

void ShardSet::open(const std::filesystem::path& path) {
  Shard shard{io::SafetensorsFile(path), {}, {}, {}, {}, num_documents_, 0, num_items_};
  const Schema schema = read_schema(shard.file);
  std::map<std::string, std::string> fingerprints;
  for (const auto& [key, value] : shard.file.metadata())
    if (key.starts_with(kFingerprint))
      fingerprints[key.substr(std::string_view(kFingerprint).size())] = value;
    else if (key.starts_with(kSkipped))
      counts_[key.substr(std::string_view(kSkipped).size())] += metadata_number(shard.file, key, 0);
  if (shards_.empty()) schema_ = schema, fingerprints_ = fingerprints;
  MOEGRAFT_CHECK(fingerprints == fingerprints_, path.string(), " was made with another tokenizer or codec than ",
                 shards_.front().file.path().string(), " in the same folder");
  MOEGRAFT_CHECK(schema == schema_, path.string(), " has other modalities, vocabulary or codebook than ",
                 shards_.front().file.path().string(), " in the same folder");
  shard.ids_T = checked_tensor(shard.file, "ids", at::kInt);
  shard.modality_T = checked_tensor(shard.file, "modality", at::kByte);
  shard.offsets = checked_tensor(shard.file, "document_offsets", at::kLong);
  const int64_t T = shard.ids_T.numel(), n = shard.offsets.numel() - 1;
  MOEGRAFT_CHECK(shard.modality_T.numel() == T, path.string(), ": \"modality\" must have as many entries as \"ids\" (",
                 T, "), got ", shard.modality_T.numel());
  check_offsets(shard.file, "document_offsets", shard.offsets, T, "document");
  if (shard.file.contains("item_offsets")) {
    shard.item_offsets = checked_tensor(shard.file, "item_offsets", at::kLong);
    check_offsets(shard.file, "item_offsets", shard.item_offsets, n, "item");
  }
  shard.num_documents = n;
  num_documents_ += n;
  num_items_ += shard.item_offsets.defined() ? shard.item_offsets.numel() - 1 : n;
  num_tokens_ += T;
  shards_.push_back(std::move(shard));
}

// Sets that say how many files they have: a copy that was cut short, or files of two sets in one folder, do not pass
// for a whole one.
void ShardSet::check_whole() const {
  std::map<int64_t, int64_t> places;  // of numbered files: how often
  int64_t expected = 0;
  for (const auto& shard : shards_) {
    const auto& metadata = shard.file.metadata();
    if (!metadata.contains(kPlace)) continue;
    ++places[metadata_number(shard.file, kPlace, 0)];
    if (metadata.contains(kCount)) expected = std::max(expected, metadata_number(shard.file, kCount, 1));
  }
  if (places.empty() || !std::filesystem::is_directory(path_)) return;
  const bool whole = expected > 0 && int64_t(places.size()) == expected && int64_t(shards_.size()) == expected &&
                     places.begin()->first == 0 && places.rbegin()->first == expected - 1;
  MOEGRAFT_CHECK(whole, "data source ", path_.string(), " is incomplete: it holds ", shards_.size(), " file(s)",
                 expected > 0 ? " of a set of " + std::to_string(expected) : ", and the last of its set is missing",
                 "; copy or prepare it again");
}

const ShardSet::Shard& ShardSet::shard_of(int64_t& index) const {
  MOEGRAFT_INVARIANT(index >= 0 && index < num_documents_, "document ", index, " of ", num_documents_);
  const auto after = std::upper_bound(shards_.begin(), shards_.end(), index,
                                      [](int64_t i, const Shard& shard) { return i < shard.first_document; });
  const Shard& shard = *(after - 1);
  index -= shard.first_document;
  return shard;
}

Item ShardSet::item(int64_t index) const {
  MOEGRAFT_INVARIANT(index >= 0 && index < num_items_, "item ", index, " of ", num_items_);
  const auto after = std::upper_bound(shards_.begin(), shards_.end(), index,
                                      [](int64_t i, const Shard& shard) { return i < shard.first_item; });
  const Shard& shard = *(after - 1);
  if (!shard.item_offsets.defined()) return {shard.first_document + index - shard.first_item, 1};
  const auto* offsets = shard.item_offsets.const_data_ptr<int64_t>() + (index - shard.first_item);
  return {shard.first_document + offsets[0], offsets[1] - offsets[0]};
}

int64_t ShardSet::document_length(int64_t index) const {
  const Shard& shard = shard_of(index);
  const auto* offsets = shard.offsets.const_data_ptr<int64_t>();
  return offsets[index + 1] - offsets[index];
}

std::vector<Segment> ShardSet::runs(int64_t index) const {
  const Shard& shard = shard_of(index);
  const auto* offsets = shard.offsets.const_data_ptr<int64_t>();
  const int64_t begin = offsets[index], end = offsets[index + 1];
  const auto* ids = shard.ids_T.const_data_ptr<int32_t>();
  const auto* modality = shard.modality_T.const_data_ptr<uint8_t>();
  const auto& known = schema_.modalities;
  std::vector<Segment> segments;
  for (int64_t t = begin; t < end;) {
    const uint8_t m = modality[t];
    MOEGRAFT_CHECK(m < known.size(), shard.file.path().string(), ": document ", index, " has modality ", int(m),
                   " at token ", t, ", but only ", known.size(), " are named");
    int64_t stop = t;
    while (stop < end && modality[stop] == m) ++stop;
    MOEGRAFT_CHECK(m == 0 || (stop - t) % known[m].item_length == 0, shard.file.path().string(), ": document ", index,
                   " has a run of ", stop - t, " ", known[m].name, " codes, not a multiple of the item length ",
                   m ? known[m].item_length : 1);
    segments.push_back({m, {ids + t, static_cast<size_t>(stop - t)}});
    t = stop;
  }
  return segments;
}

std::vector<Segment> ShardSet::document(int64_t index) const {
  auto segments = runs(index);
  const Shard& shard = shard_of(index);
  const auto* first = shard.ids_T.const_data_ptr<int32_t>();
  for (const auto& segment : segments) {
    const auto& known = schema_.modalities[static_cast<size_t>(segment.modality)];
    Allowed allowed(known);
    for (const int32_t& id : segment.ids) {
      MOEGRAFT_CHECK(allowed.holds(id), shard.file.path().string(), ": document ", index, " has ", known.name, " id ",
                     id, " at token ", &id - first, ", outside ", allowed.text());
      allowed.next_place();
    }
  }
  return segments;
}

void ShardSet::validate() const {
  for (int64_t i = 0; i < num_documents_; ++i) document(i);
}

ShardWriter::ShardWriter(const std::filesystem::path& folder, Schema schema, bool overwrite, int64_t max_tokens,
                         std::map<std::string, std::string> metadata)
    : folder_(folder),
      schema_(std::move(schema)),
      overwrite_(overwrite),
      max_tokens_(max_tokens),
      metadata_(std::move(metadata)) {
  MOEGRAFT_INVARIANT(!schema_.modalities.empty() && schema_.modalities[0].name == "text", "a schema begins with text");
  for (const auto& modality : schema_.modalities)
    MOEGRAFT_INVARIANT(find_mismatch(modality).empty(), find_mismatch(modality));
  check_replace();
}

void ShardWriter::check_replace() const {
  const auto& folder = folder_.target();
  if (!std::filesystem::exists(folder)) return;
  MOEGRAFT_CHECK_USAGE(std::filesystem::is_directory(folder), folder.string(),
                       " is a file; shards are written into a folder");
  // The whole folder is exchanged at the end: nothing but shards may lie in it.
  int64_t old = 0;
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    MOEGRAFT_CHECK_USAGE(is_shard(item.path()), folder.string(), " holds ", item.path().filename().string(),
                         ", which is no shard: name a folder of their own for shards");
    ++old;
  }
  MOEGRAFT_CHECK_USAGE(old == 0 || overwrite_, folder.string(), " already holds ", old,
                       " shard(s); give --overwrite to replace them, or another folder");
}

void ShardWriter::add(const std::vector<Segment>& document, bool same_item) {
  MOEGRAFT_INVARIANT(!same_item || num_documents_ > 0, "the first document begins an item");
  if (!same_item && static_cast<int64_t>(ids_.size()) >= max_tokens_)
    flush();  // not sooner: the last file, which says how many there are, holds a document; an item is in one file
  const size_t before = ids_.size();
  for (const auto& segment : document) {
    MOEGRAFT_INVARIANT(segment.modality >= 0 && segment.modality < static_cast<int64_t>(schema_.modalities.size()),
                       "modality ", segment.modality);
    const auto& known = schema_.modalities[segment.modality];
    Allowed allowed(known);
    for (int32_t id : segment.ids) {
      MOEGRAFT_CHECK(allowed.holds(id), "document ", num_documents_, ": ", known.name, " id ", id, " is outside ",
                     allowed.text());
      allowed.next_place();
      ids_.push_back(id);
      modality_.push_back(static_cast<uint8_t>(segment.modality));
    }
    MOEGRAFT_CHECK(segment.modality == 0 || static_cast<int64_t>(segment.ids.size()) % known.item_length == 0,
                   "document ", num_documents_, ": ", segment.ids.size(), " ", known.name,
                   " codes are not a whole number of items of ", known.item_length);
  }
  MOEGRAFT_CHECK(ids_.size() > before, "document ", num_documents_, " is empty");
  offsets_.push_back(static_cast<int64_t>(ids_.size()));
  if (same_item) item_offsets_.pop_back();
  item_offsets_.push_back(static_cast<int64_t>(offsets_.size()) - 1);
  num_tokens_ += static_cast<int64_t>(ids_.size() - before);
  ++num_documents_;
}

void ShardWriter::flush(const std::map<std::string, std::string>& further) {
  std::map<std::string, std::string> metadata = metadata_;
  metadata.insert(further.begin(), further.end());
  metadata["format"] = kFormat, metadata["version"] = kVersion,
  metadata["text_vocab"] = std::to_string(schema_.modalities[0].num_codes),
  metadata[kPlace] = std::to_string(num_files_);
  std::vector<std::string> names;
  for (const auto& modality : schema_.modalities) {
    names.push_back(modality.name);
    if (modality.name == "text") continue;
    metadata["codes_" + modality.name] = std::to_string(modality.num_codes);
    metadata["item_length_" + modality.name] = std::to_string(modality.item_length);
    if (modality.codebooks > 1) metadata["codebooks_" + modality.name] = std::to_string(modality.codebooks);
    if (!modality.positions.empty())
      metadata["positions_" + modality.name] = codec::format_positions(modality.positions);
  }
  metadata["modalities"] = join(names, ",");
  char name[64];
  std::snprintf(name, sizeof name, "shard-%05lld.safetensors", static_cast<long long>(num_files_++));
  const auto view = [](auto& values, at::ScalarType dtype) {
    return at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, dtype);
  };
  io::TensorMap tensors{{"ids", view(ids_, at::kInt)},
                        {"modality", view(modality_, at::kByte)},
                        {"document_offsets", view(offsets_, at::kLong)}};
  if (item_offsets_.size() < offsets_.size()) tensors["item_offsets"] = view(item_offsets_, at::kLong);
  io::save_safetensors(folder_.path() / name, tensors, metadata);
  ids_.clear();
  modality_.clear();
  offsets_.assign(1, 0);
  item_offsets_.assign(1, 0);
}

void ShardWriter::finish(const std::map<std::string, std::string>& last_metadata) {
  MOEGRAFT_CHECK(num_documents_ > 0, "nothing to write to ", folder_.target().string(), ": the data set is empty");
  std::map<std::string, std::string> last = last_metadata;
  last[kCount] = std::to_string(num_files_ + 1);
  flush(last);
  folder_.publish([this] { check_replace(); });
}

}  // namespace moegraft::data
