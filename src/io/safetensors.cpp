#include "moegraft/io/safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>

#include "atomic_file.h"
#include "moegraft/io/mapped_files.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::io {

namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxRank = 64;                    // at::Tensor's own limit on dimensions

struct DtypeName {
  const char* name;
  at::ScalarType type;
};
constexpr DtypeName kDtypes[] = {
    {"BOOL", at::kBool},
    {"U8", at::kByte},
    {"I8", at::kChar},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E8M0", at::kFloat8_e8m0fnu},
    {"I16", at::kShort},
    {"U16", at::kUInt16},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I32", at::kInt},
    {"U32", at::kUInt32},
    {"F32", at::kFloat},
    {"I64", at::kLong},
    {"U64", at::kUInt64},
    {"F64", at::kDouble},
    {"C64", at::kComplexFloat},
};

const DtypeName* find_dtype(const std::string& name) {
  for (const auto& entry : kDtypes)
    if (name == entry.name) return &entry;
  return nullptr;
}
const char* dtype_name(at::ScalarType type) {
  for (const auto& entry : kDtypes)
    if (type == entry.type) return entry.name;
  return nullptr;
}

std::string known_dtypes() {
  std::vector<std::string> names;
  for (const auto& entry : kDtypes) names.push_back(entry.name);
  return join(names, ", ");
}

std::string quoted(const std::string& name) { return "tensor '" + shortened(name) + "'"; }

// Looks for what the parser would pass over: a key that is there twice hides a tensor; and a depth that no header has.
// Linear in the header.
class HeaderCheck : public nlohmann::json_sax<json> {
 public:
  explicit HeaderCheck(const std::string& file) : file_(file) {}
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return begin(); }
  bool start_array(std::size_t) override { return begin(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) fail(file_, ": the header has the key '", shortened(name), "' twice");
    return true;
  }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool parse_error(std::size_t at, const std::string&, const nlohmann::detail::exception&) override {
    error_ = at;
    return false;
  }
  std::optional<size_t> error() const { return error_; }

 private:
  bool begin() {
    if (keys_.size() > 4) fail(file_, ": header nests too deeply to be a safetensors header");
    keys_.emplace_back();
    return true;
  }
  bool end() {
    keys_.pop_back();
    return true;
  }
  const std::string& file_;
  std::vector<std::unordered_set<std::string>> keys_;
  std::optional<size_t> error_;
};

json parse_header(const char* text, size_t bytes, const std::string& file) {
  HeaderCheck check(file);
  if (!json::sax_parse(text, text + bytes, &check))
    fail(file, ": the header is not valid JSON (byte ", check.error().value_or(0), " of ", bytes,
         "): not a safetensors file, or damaged");
  return json::parse(text, text + bytes);
}

struct Entry {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin, end;  // within the data section
};

uint64_t unsigned_field(const json& value, const std::string& where) {
  MOEGRAFT_CHECK(value.is_number_unsigned(), where, " must be a non-negative integer, got ",
                 shortened(value.dump(-1, ' ', true, json::error_handler_t::replace)));
  return value.get<uint64_t>();
}

Entry parse_entry(const std::string& name, const json& value, uint64_t data_bytes, const std::string& file) {
  const std::string where = file + ": " + quoted(name) + ": ";
  MOEGRAFT_CHECK(
      value.is_object() && value.contains("dtype") && value.contains("shape") && value.contains("data_offsets"), where,
      "expected an object with dtype, shape and data_offsets");
  const json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  MOEGRAFT_CHECK(dtype.is_string(), where, "dtype must be a string");
  const DtypeName* known = find_dtype(dtype.get<std::string>());
  MOEGRAFT_CHECK(known != nullptr, where, "unknown dtype '", shortened(dtype.get<std::string>()), "', expected one of ",
                 known_dtypes());
  MOEGRAFT_CHECK(shape.is_array() && shape.size() <= kMaxRank, where, "shape must be a list of at most ", kMaxRank,
                 " sizes");
  MOEGRAFT_CHECK(offsets.is_array() && offsets.size() == 2, where, "data_offsets must be [begin, end]");

  Entry entry{known->type,
              {},
              unsigned_field(offsets[0], where + "data_offsets"),
              unsigned_field(offsets[1], where + "data_offsets")};
  MOEGRAFT_CHECK(entry.begin <= entry.end && entry.end <= data_bytes, where, "data_offsets [", entry.begin, ", ",
                 entry.end, "] lie outside the file's ", data_bytes, " data bytes: truncated or damaged");
  const uint64_t item = c10::elementSize(known->type);
  uint64_t bytes = item;
  bool overflow = false, empty = false;
  for (const auto& size_json : shape) {
    const uint64_t size = unsigned_field(size_json, where + "shape");
    overflow |= size > static_cast<uint64_t>(INT64_MAX);
    empty |= size == 0;
    // A zero size elsewhere makes the product zero, but strides multiply the rest: keep those in range too.
    overflow |=
        __builtin_mul_overflow(bytes, std::max<uint64_t>(size, 1), &bytes) || bytes > static_cast<uint64_t>(INT64_MAX);
    entry.shape.push_back(static_cast<int64_t>(size));
  }
  MOEGRAFT_CHECK(!overflow, where, "shape ", entry.shape, " overflows");
  if (empty) bytes = 0;
  MOEGRAFT_CHECK(bytes == entry.end - entry.begin, where, "shape ", entry.shape, " of ", known->name, " needs ", bytes,
                 " bytes, data_offsets give ", entry.end - entry.begin);
  return entry;
}

}  // namespace

struct SafetensorsFile::Mapping {
  std::filesystem::path path;
  char* base = nullptr;
  size_t bytes = 0;
  const char* data = nullptr;
  std::map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;

  explicit Mapping(const std::filesystem::path& file) : path(file) { map(); }
  ~Mapping() {
    if (base == nullptr) return;
    forget_mapping(base);
    ::munmap(base, bytes);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void map() {
    const int fd =
        ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe without a writer would block for ever
    if (fd < 0) fail("cannot read ", path.string(), ": ", std::strerror(errno));
    struct stat info{};
    const int status = ::fstat(fd, &info);
    bytes = static_cast<size_t>(info.st_size);
    void* mapped = MAP_FAILED;
    int error = status == 0 ? 0 : errno;
    if (status == 0 && S_ISREG(info.st_mode) && bytes > 0) {
      // Read-only pages: a stray in-place write to a frozen weight stops the program instead of changing the base.
      mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
      error = mapped == MAP_FAILED ? errno : 0;
    }
    ::close(fd);
    if (error != 0) fail("cannot read ", path.string(), ": ", std::strerror(error));
    MOEGRAFT_CHECK(S_ISREG(info.st_mode), "cannot read ", path.string(), ": not a regular file");
    if (mapped == MAP_FAILED) return;
    base = static_cast<char*>(mapped);
    note_mapping(base, bytes, path.string());
  }

  void parse() {
    const std::string file = path.string();
    MOEGRAFT_CHECK(bytes >= 8, file, ": a safetensors file has at least 8 bytes, got ", bytes, ": truncated?");
    MOEGRAFT_CHECK(!std::string_view(base, bytes).starts_with("version https://git-lfs"), file,
                   " is a git-lfs pointer, not the file itself: fetch it with git lfs pull");
    uint64_t header_bytes;
    std::memcpy(&header_bytes, base, 8);
    MOEGRAFT_CHECK(header_bytes <= kMaxHeaderBytes, file, ": header size ", header_bytes,
                   " exceeds the format's limit of ", kMaxHeaderBytes, ": not a safetensors file, or damaged");
    MOEGRAFT_CHECK(header_bytes <= bytes - 8, file, ": header of ", header_bytes, " bytes in a file of ", bytes,
                   ": truncated or not a safetensors file");
    data = base + 8 + header_bytes;
    const uint64_t data_bytes = bytes - 8 - header_bytes;
    const json header = parse_header(base + 8, header_bytes, file);
    MOEGRAFT_CHECK(header.is_object(), file, ": the header must be a JSON object");

    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") {
        MOEGRAFT_CHECK(value.is_object(), file, ": __metadata__ must map strings to strings");
        for (const auto& [key, text] : value.items()) {
          MOEGRAFT_CHECK(text.is_string(), file, ": __metadata__ '", key, "' must be a string");
          metadata[key] = text.get<std::string>();
        }
        continue;
      }
      entries.emplace(name, parse_entry(name, value, data_bytes, file));
    }
    check_coverage(data_bytes, file);
  }

  // The format wants the ranges to cover the data exactly: an overlap or a hole means damage (or something hidden).
  void check_coverage(uint64_t data_bytes, const std::string& file) const {
    std::vector<std::pair<const Entry*, const std::string*>> ordered;
    for (const auto& [name, entry] : entries) ordered.emplace_back(&entry, &name);
    std::sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
      return std::tie(a.first->begin, a.first->end) < std::tie(b.first->begin, b.first->end);
    });
    uint64_t at = 0;
    for (const auto& [entry, name] : ordered) {
      MOEGRAFT_CHECK(entry->begin == at, file, ": ", quoted(*name), " begins at byte ", entry->begin, ", expected ", at,
                     ": ", entry->begin < at ? "it overlaps another tensor" : "there is a hole before it");
      at = entry->end;
    }
    MOEGRAFT_CHECK(at == data_bytes, file, ": the tensors cover ", at, " bytes of ", data_bytes,
                   " data bytes: damaged or with trailing bytes");
  }

  const Entry& find(const std::string& name) const {
    const auto it = entries.find(name);
    if (it != entries.end()) return it->second;
    std::vector<std::string> names;
    for (const auto& [known, entry] : entries) names.push_back(known);
    const std::string near = nearest_word(name, names);
    fail(path.string(), " has no ", quoted(name),
         near.empty() ? " (it holds " + std::to_string(names.size()) + " tensors)" : "; did you mean '" + near + "'?");
  }
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) {
  auto mapping = std::make_shared<Mapping>(path);
  mapping->parse();
  mapping_ = std::move(mapping);
}

const std::filesystem::path& SafetensorsFile::path() const { return mapping_->path; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return mapping_->metadata; }
bool SafetensorsFile::contains(const std::string& name) const { return mapping_->entries.count(name) > 0; }
FileRange SafetensorsFile::range(const std::string& name) const {
  const Entry& entry = mapping_->find(name);
  return {path(), mapping_->data - mapping_->base + int64_t(entry.begin), int64_t(entry.end - entry.begin)};
}
std::vector<int64_t> SafetensorsFile::shape(const std::string& name) const { return mapping_->find(name).shape; }
at::ScalarType SafetensorsFile::dtype(const std::string& name) const { return mapping_->find(name).dtype; }

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : mapping_->entries) names.push_back(name);
  return names;
}

bool SafetensorsFile::is_view(const std::string& name) const {
  const Entry& entry = mapping_->find(name);
  // The format does not promise alignment; typed loads need it.
  return entry.begin == entry.end ||
         reinterpret_cast<uintptr_t>(mapping_->data + entry.begin) % c10::elementSize(entry.dtype) == 0;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& entry = mapping_->find(name);
  const auto options = at::TensorOptions().dtype(entry.dtype);
  const size_t bytes = entry.end - entry.begin;
  if (bytes == 0) return at::empty(entry.shape, options);
  const char* at_data = mapping_->data + entry.begin;
  // Reading a bool that is neither 0 nor 1 is undefined behaviour, so such a file is refused.
  if (entry.dtype == at::kBool)
    MOEGRAFT_CHECK(std::all_of(at_data, at_data + bytes, [](char c) { return c == 0 || c == 1; }), path().string(),
                   ": ", quoted(name), ": a BOOL byte is neither 0 nor 1: damaged");
  if (!is_view(name)) {
    at::Tensor copy = at::empty(entry.shape, options);
    std::memcpy(copy.mutable_data_ptr(), at_data, bytes);
    return copy;
  }
  auto keep_alive = [mapping = mapping_](void*) {};
  return at::from_blob(const_cast<char*>(at_data), entry.shape, std::move(keep_alive), options);
}

bool SafetensorsFile::holds(const at::Tensor& view) const {
  if (!view.defined() || !view.is_cpu() || view.numel() == 0) return false;
  const char* at_data = static_cast<const char*>(view.const_data_ptr());
  return at_data >= mapping_->base && at_data < mapping_->base + mapping_->bytes;
}

bool SafetensorsFile::release_pages(const at::Tensor& view) const {
  if (!holds(view)) return false;
  // Whole windows of the kernel's fault-around (64 KiB), since the neighbours' faults bring in this view's first and
  // last pages: the mapping is shared and read-only, so its pages are never dirty and dropping a neighbour's costs a
  // fault at most.
  constexpr size_t kWindow = size_t{64} << 10;
  int64_t extent = 1;
  for (int64_t d = 0; d < view.dim(); ++d) extent += (view.size(d) - 1) * view.stride(d);
  const size_t begin = size_t(static_cast<const char*>(view.const_data_ptr()) - mapping_->base),
               end = begin + size_t(extent) * view.element_size();
  const size_t from = begin / kWindow * kWindow,
               to = std::min((end + kWindow - 1) / kWindow * kWindow, mapping_->bytes);
  return ::madvise(mapping_->base + from, to - from, MADV_DONTNEED) == 0;
}

TensorMap load_safetensors(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  TensorMap tensors;
  for (const auto& name : file.names()) tensors[name] = file.tensor(name);
  return tensors;
}

void save_safetensors(const std::filesystem::path& path, const TensorMap& tensors,
                      const std::map<std::string, std::string>& metadata) {
  // Widest items first, then by name: the format allows no padding between tensors, and this order keeps each one
  // aligned to its own size.
  std::vector<TensorMap::const_iterator> ordered;
  for (auto it = tensors.begin(); it != tensors.end(); ++it) ordered.push_back(it);
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const auto& a, const auto& b) { return a->second.element_size() > b->second.element_size(); });

  json header = json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& it : ordered) {
    const auto& [name, tensor] = *it;
    MOEGRAFT_CHECK(name != "__metadata__", path.string(), ": a tensor must not be named __metadata__");
    MOEGRAFT_CHECK(tensor.defined() && tensor.layout() == at::kStrided, path.string(), ": ", quoted(name),
                   " is undefined or not dense");
    const char* dtype = dtype_name(tensor.scalar_type());
    MOEGRAFT_CHECK(dtype != nullptr, path.string(), ": ", quoted(name), " has dtype ",
                   c10::toString(tensor.scalar_type()), ", which safetensors cannot hold");
    header[name] = {
        {"dtype", dtype}, {"shape", tensor.sizes().vec()}, {"data_offsets", {offset, offset + tensor.nbytes()}}};
    offset += tensor.nbytes();
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::type_error&) { fail(path.string(), ": a tensor name or a metadata value is not valid UTF-8"); }
  // The data starts at a multiple of 64 (the format asks for 8): aligned vector loads from the mapping.
  text.append((64 - (8 + text.size()) % 64) % 64, ' ');
  const uint64_t header_bytes = text.size();
  MOEGRAFT_CHECK(header_bytes <= kMaxHeaderBytes, path.string(), ": the header would take ", header_bytes,
                 " bytes, above the format's ", kMaxHeaderBytes);

  AtomicFile file(path);
  file.write(&header_bytes, 8);
  file.write(text.data(), text.size());
  for (const auto& it : ordered) {
    const at::Tensor dense = it->second.detach().to(at::kCPU).resolve_conj().resolve_neg().contiguous();
    if (dense.nbytes() > 0) file.write(dense.const_data_ptr(), dense.nbytes());
  }
  file.commit();
}

}  // namespace moegraft::io
