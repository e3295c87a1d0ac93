#include "moegraft/convert/gguf.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cerrno>
#include <cstring>
#include <type_traits>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::convert {
namespace {

constexpr uint64_t kMostDimensions = 4;  // ggml's own limit
constexpr uint64_t kLongestName = 1 << 16;

// Types of values, as the format counts them.
enum class Kind : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// Bytes of the header, in order, none beyond the file.
class Reader {
 public:
  Reader(std::ifstream& in, uint64_t size, const std::string& file) : in_(in), size_(size), file_(file) {}

  uint64_t position() const { return at_; }
  uint64_t left() const { return size_ - at_; }
  void bytes(void* out, uint64_t count, const char* what) {
    MOEGRAFT_CHECK(count <= left(), file_, ": ", what, " needs ", count, " bytes at byte ", at_, ", ", left(),
                   " are left: truncated or damaged");
    in_.read(static_cast<char*>(out), static_cast<std::streamsize>(count));
    MOEGRAFT_CHECK(in_.good(), "cannot read ", file_, ": ", std::strerror(errno));
    at_ += count;
  }
  template <class T>
  T number(const char* what) {
    T value;
    bytes(&value, sizeof value, what);
    return value;
  }
  std::string string(const char* what, uint64_t longest = UINT64_MAX) {
    const auto length = number<uint64_t>(what);
    MOEGRAFT_CHECK(length <= longest && length <= left(), file_, ": ", what, " of ", length, " bytes at byte ", at_,
                   ": truncated or damaged");
    std::string text(length, '\0');
    if (length > 0) bytes(text.data(), length, what);
    return text;
  }

 private:
  std::ifstream& in_;
  uint64_t size_, at_ = 0;
  const std::string& file_;
};

template <class T>
std::vector<T> read_numbers(Reader& in, Kind kind, uint64_t count, const std::string& place) {
  const auto as = [&]<class From>(From) {
    MOEGRAFT_CHECK(count <= in.left() / sizeof(From), place, " has ", count,
                   " entries, more than the file holds: truncated or damaged");
    std::vector<From> raw(count);
    if (count > 0) in.bytes(raw.data(), count * sizeof(From), "an array");
    if constexpr (std::is_same_v<From, uint64_t>)
      for (const uint64_t v : raw) MOEGRAFT_CHECK(v <= uint64_t(INT64_MAX), place, ": ", v, " is out of range");
    return std::vector<T>(raw.begin(), raw.end());
  };
  switch (kind) {
    case Kind::u8:
    case Kind::boolean: return as(uint8_t{});
    case Kind::i8: return as(int8_t{});
    case Kind::u16: return as(uint16_t{});
    case Kind::i16: return as(int16_t{});
    case Kind::u32: return as(uint32_t{});
    case Kind::i32: return as(int32_t{});
    case Kind::u64: return as(uint64_t{});
    case Kind::i64: return as(int64_t{});
    case Kind::f32: return as(float{});
    case Kind::f64: return as(double{});
    default: fail(place, " has values of unknown type ", uint32_t(kind));
  }
}

GgufFile::Value read_array(Reader& in, const std::string& place) {
  const auto kind = Kind(in.number<uint32_t>("an array's type"));
  const auto count = in.number<uint64_t>("an array's length");
  if (kind == Kind::string) {
    MOEGRAFT_CHECK(count <= in.left() / 8, place, " has ", count,
                   " entries, more than the file holds: truncated or damaged");
    std::vector<std::string> texts;
    texts.reserve(count);
    for (uint64_t i = 0; i < count; ++i) texts.push_back(in.string("a string"));
    return texts;
  }
  MOEGRAFT_CHECK(kind != Kind::array, place, " is an array of arrays, which no key known here is");
  if (kind == Kind::f32 || kind == Kind::f64) return read_numbers<double>(in, kind, count, place);
  return read_numbers<int64_t>(in, kind, count, place);
}

GgufFile::Value read_value(Reader& in, const std::string& place) {
  const auto kind = Kind(in.number<uint32_t>("a value's type"));
  switch (kind) {
    case Kind::string: return in.string("a string");
    case Kind::array: return read_array(in, place);
    case Kind::boolean: return in.number<uint8_t>("a value") != 0;
    case Kind::f32:
    case Kind::f64: return read_numbers<double>(in, kind, 1, place).front();
    default: return read_numbers<int64_t>(in, kind, 1, place).front();
  }
}

const GgufType* find_type(uint32_t id) {
  for (const auto& type : gguf_types())
    if (type.id == id) return &type;
  return nullptr;
}

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path) : path_(path) {
  const std::string file = path.string();
  std::error_code error;
  MOEGRAFT_CHECK(std::filesystem::is_regular_file(path, error), "cannot read ", file, ": ",
                 error ? error.message() : "not a regular file");
  size_ = std::filesystem::file_size(path);
  in_.open(path, std::ios::binary);
  MOEGRAFT_CHECK(in_.is_open(), "cannot read ", file, ": ", std::strerror(errno));
  Reader in(in_, size_, file);
  char magic[4] = {};
  if (size_ >= sizeof magic) in.bytes(magic, sizeof magic, "the magic");
  MOEGRAFT_CHECK(std::memcmp(magic, "GGUF", 4) == 0, file, " is not a GGUF file: it does not begin with \"GGUF\"");
  const auto version = in.number<uint32_t>("the version");
  MOEGRAFT_CHECK(version == 2 || version == 3, file, ": GGUF version must be 2 or 3 (little-endian), got ", version);
  const auto num_tensors = in.number<uint64_t>("the number of tensors"),
             num_keys = in.number<uint64_t>("the number of keys");
  for (uint64_t i = 0; i < num_keys; ++i) {
    const std::string key = in.string("a key", kLongestName);
    MOEGRAFT_CHECK(values_.emplace(key, read_value(in, file + ": " + key)).second, file, ": the key ", key,
                   " is there twice");
  }
  for (uint64_t i = 0; i < num_tensors; ++i) {
    const std::string name = in.string("a tensor's name", kLongestName);
    const auto dimensions = in.number<uint32_t>("a tensor's dimensions");
    MOEGRAFT_CHECK(dimensions >= 1 && dimensions <= kMostDimensions, file, ": tensor ", name, " has ", dimensions,
                   " dimensions, expected 1 to ", kMostDimensions);
    Entry entry;
    int64_t elements = 1;
    for (uint32_t d = 0; d < dimensions; ++d) {
      const auto size = in.number<uint64_t>("a tensor's size");
      MOEGRAFT_CHECK(
          size > 0 && size <= uint64_t(INT64_MAX) && !__builtin_mul_overflow(elements, int64_t(size), &elements), file,
          ": tensor ", name, " has an impossible size ", size);
      entry.shape.insert(entry.shape.begin(), int64_t(size));  // the format counts from the innermost
    }
    entry.type = in.number<uint32_t>("a tensor's type");
    entry.begin = in.number<uint64_t>("a tensor's offset");
    MOEGRAFT_CHECK(tensors_.emplace(name, std::move(entry)).second, file, ": the tensor ", name, " is there twice");
  }
  const int64_t align = integer("general.alignment", 32);
  MOEGRAFT_CHECK(align > 0 && align <= (1 << 20) && (align & (align - 1)) == 0, file,
                 ": general.alignment must be a power of two, got ", align);
  const uint64_t data = (in.position() + uint64_t(align) - 1) / uint64_t(align) * uint64_t(align);
  for (auto& [name, entry] : tensors_) {
    const GgufType* type = find_type(entry.type);
    uint64_t bytes = 1;  // of a type that is not known here: checked when it is read
    if (type) {
      int64_t elements = 1;
      for (const int64_t size : entry.shape) elements *= size;
      MOEGRAFT_CHECK(entry.shape.back() % type->block_values == 0, file, ": rows of ", name, " have ",
                     entry.shape.back(), " values, no multiple of ", type->name, "'s ", type->block_values);
      MOEGRAFT_CHECK(elements / type->block_values <= INT64_MAX / type->block_bytes, file, ": tensor ", name,
                     " is too large");
      bytes = uint64_t(elements / type->block_values * type->block_bytes);
    }
    MOEGRAFT_CHECK(data <= size_ && entry.begin <= size_ - data && bytes <= size_ - data - entry.begin, file,
                   ": tensor ", name, " ends ", "beyond the file's ", size_,
                   " bytes: truncated (load it again) or damaged");
    entry.begin += data;
  }
}

const GgufFile::Value& GgufFile::value(const std::string& key) const {
  const auto found = values_.find(key);
  MOEGRAFT_CHECK(found != values_.end(), path_.string(), ": the key ", key, " is missing");
  return found->second;
}

int64_t GgufFile::integer(const std::string& key) const {
  const auto* v = std::get_if<int64_t>(&value(key));
  MOEGRAFT_CHECK(v, path_.string(), ": ", key, " must be an integer");
  return *v;
}
double GgufFile::number(const std::string& key) const {
  const Value& v = value(key);
  if (const auto* integer = std::get_if<int64_t>(&v)) return double(*integer);
  MOEGRAFT_CHECK(std::holds_alternative<double>(v), path_.string(), ": ", key, " must be a number");
  return std::get<double>(v);
}
bool GgufFile::boolean(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  const auto* v = std::get_if<bool>(&value(key));
  MOEGRAFT_CHECK(v, path_.string(), ": ", key, " must be true or false");
  return *v;
}
std::string GgufFile::string(const std::string& key) const {
  const auto* v = std::get_if<std::string>(&value(key));
  MOEGRAFT_CHECK(v, path_.string(), ": ", key, " must be a string");
  return *v;
}
const std::vector<std::string>& GgufFile::strings(const std::string& key) const {
  const auto* v = std::get_if<std::vector<std::string>>(&value(key));
  MOEGRAFT_CHECK(v, path_.string(), ": ", key, " must be an array of strings");
  return *v;
}
std::vector<int64_t> GgufFile::integers(const std::string& key) const {
  const auto* v = std::get_if<std::vector<int64_t>>(&value(key));
  MOEGRAFT_CHECK(v, path_.string(), ": ", key, " must be an array of integers");
  return *v;
}
std::vector<double> GgufFile::numbers(const std::string& key) const {
  const auto* v = std::get_if<std::vector<double>>(&value(key));
  MOEGRAFT_CHECK(v, path_.string(), ": ", key, " must be an array of numbers");
  return *v;
}

const GgufFile::Entry& GgufFile::entry(const std::string& tensor) const {
  const auto found = tensors_.find(tensor);
  if (found == tensors_.end()) {
    const std::string near = nearest_word(tensor, names());
    fail(path_.string(), " has no tensor ", tensor, near.empty() ? "" : "; the nearest is " + near);
  }
  return found->second;
}
std::vector<std::string> GgufFile::names() const {
  std::vector<std::string> out;
  for (const auto& [name, entry] : tensors_) out.push_back(name);
  return out;
}
std::vector<int64_t> GgufFile::shape(const std::string& tensor) const { return entry(tensor).shape; }

const GgufType& GgufFile::type(const std::string& tensor) const {
  const GgufType* type = find_type(entry(tensor).type);
  if (!type) {
    std::vector<std::string> known;
    for (const auto& t : gguf_types()) known.emplace_back(t.name);
    fail(path_.string(), ": tensor ", tensor, " has type ", entry(tensor).type,
         ", which cannot be read; known: ", join(known, ", "), " (convert the model to one of them, e.g. Q8_0)");
  }
  return *type;
}

at::Tensor GgufFile::read(const std::string& tensor) const {
  const GgufType& t = type(tensor);
  const Entry& e = entry(tensor);
  at::Tensor out = at::empty(e.shape, at::kFloat);
  const int64_t blocks = out.numel() / t.block_values;
  std::vector<uint8_t> bytes(size_t(blocks * t.block_bytes));
  in_.clear();
  in_.seekg(std::streamoff(e.begin));
  in_.read(reinterpret_cast<char*>(bytes.data()), std::streamsize(bytes.size()));
  MOEGRAFT_CHECK(in_.good(), "cannot read ", path_.string(), ": tensor ", tensor,
                 " ends early: was the file cut meanwhile?");
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) t.dequantize(bytes.data() + i * t.block_bytes, to + i * t.block_values);
  });
  return out;
}

}  // namespace moegraft::convert
