#include "moegraft/run/tensorboard.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/io/files.h"

namespace moegraft::run {
namespace {

static_assert(std::endian::native == std::endian::little, "records are written in the machine's byte order");

constexpr auto kCrcTable = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0u);
    table[i] = c;
  }
  return table;
}();

template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += char(value | 0x80);
  return bytes + char(value);
}

enum Wire { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
std::string key(int field, Wire wire) { return varint(uint64_t(field) << 3 | wire); }
std::string varint_field(int field, int64_t value) { return key(field, kVarint) + varint(uint64_t(value)); }
std::string bytes_field(int field, std::string_view bytes) {
  return key(field, kBytes) + varint(bytes.size()) + std::string(bytes);
}

std::string event(double wall_time, int64_t step, const std::string& what) {
  // Like protobuf's own writers, a zero is left out.
  return key(1, kFixed64) + raw(wall_time) + (step ? varint_field(2, step) : "") + what;
}

// Masking keeps a CRC of data that itself holds CRCs well mixed (TFRecord's format).
uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xA282EAD8u; }

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

int64_t big_endian(std::string_view bytes) {
  int64_t value = 0;
  for (const unsigned char byte : bytes) value = value << 8 | byte;
  return value;
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t crc = ~0u;
  for (const unsigned char byte : bytes) crc = kCrcTable[(crc ^ byte) & 255] ^ (crc >> 8);
  return ~crc;
}

std::string frame_record(std::string_view data) {
  const std::string length = raw(uint64_t(data.size()));
  return length + raw(masked_crc(length)) + std::string(data) + raw(masked_crc(data));
}

std::string encode_scalar_event(double wall_time, int64_t step, std::string_view tag, float value) {
  return event(wall_time, step, bytes_field(5, bytes_field(1, bytes_field(1, tag) + key(2, kFixed32) + raw(value))));
}

std::string encode_image_event(double wall_time, int64_t step, std::string_view tag, int64_t height, int64_t width,
                               std::string_view png) {
  const std::string image = varint_field(1, height) + varint_field(2, width) + varint_field(3, 3) + bytes_field(4, png);
  return event(wall_time, step, bytes_field(5, bytes_field(1, bytes_field(1, tag) + bytes_field(4, image))));
}

std::string encode_version_event(double wall_time) { return event(wall_time, 0, bytes_field(3, "brain.Event:2")); }

std::string encode_start_event(double wall_time, int64_t step) {
  return event(wall_time, step, bytes_field(7, varint_field(1, 1)));
}

TensorBoard::TensorBoard(const std::filesystem::path& dir, int64_t resume_step) {
  std::filesystem::create_directories(dir);
  char host[256] = {};
  if (gethostname(host, sizeof host - 1) != 0) std::strcpy(host, "unknown");
  const double time = now();
  // TensorBoard reads files in the order of their names: seconds first, then a counter for sessions within one second.
  for (int attempt = 0; fd_ < 0 && attempt < 10000; ++attempt) {
    path_ = dir / detail::concat("events.out.tfevents.", int64_t(time), ".", host, ".", getpid(), ".", attempt);
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
    if (fd_ < 0 && errno != EEXIST) break;
  }
  MOEGRAFT_CHECK(fd_ >= 0, "cannot make the event file ", path_.string(), ": ", std::strerror(errno));
  write(encode_version_event(time));
  if (resume_step >= 0) write(encode_start_event(time, resume_step + 1));
}

TensorBoard::~TensorBoard() { ::close(fd_); }

// A record is one write. Trouble here never stops a training: metrics.jsonl is the record that counts.
void TensorBoard::write(const std::string& event) {
  if (failed_) return;
  const std::string record = frame_record(event);
  if (::write(fd_, record.data(), record.size()) == ssize_t(record.size())) return;
  failed_ = true;  // what follows half a record could not be read
  log::warning("cannot write ", path_.string(), ": ", std::strerror(errno),
               "; no more TensorBoard events in this session");
}

void TensorBoard::scalar(const std::string& tag, int64_t step, double value) {
  write(encode_scalar_event(now(), step, tag, float(value)));
}

void TensorBoard::image(const std::string& tag, int64_t step, std::string_view png) {
  // PNG: 8 bytes of signature, then the IHDR chunk: length, name, width, height.
  MOEGRAFT_CHECK(png.size() > 24 && png.substr(1, 3) == "PNG" && png.substr(12, 4) == "IHDR", "the picture ", tag,
                 " is not a PNG");
  write(encode_image_event(now(), step, tag, big_endian(png.substr(20, 4)), big_endian(png.substr(16, 4)), png));
}

void TensorBoard::image_file(const std::string& tag, int64_t step, const std::filesystem::path& png) {
  image(tag, step, io::read_file(png));
}

}  // namespace moegraft::run
