// TIFF through libtiff, whose RGBA interface makes 8-bit pixels of every common kind (bilevel, palette, 16 bits, CMYK,
// YCbCr, tiles). libgd reads TIFF too, but inverts bilevel pictures and multiplies by alpha twice.
#include <tiffio.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "image_codec.h"
#include "moegraft/base/check.h"

namespace moegraft::io {
namespace {

constexpr uint64_t kMostBits = 64;  // of a pixel: four samples of 16

struct Memory {
  std::string_view bytes;
  uint64_t at = 0;
};
Memory& memory_of(thandle_t handle) { return *static_cast<Memory*>(handle); }

tmsize_t read_bytes(thandle_t handle, void* into, tmsize_t count) {
  Memory& memory = memory_of(handle);
  const uint64_t left = memory.at < memory.bytes.size() ? memory.bytes.size() - memory.at : 0;
  const uint64_t n = std::min<uint64_t>(left, count > 0 ? uint64_t(count) : 0);
  if (n > 0) std::memcpy(into, memory.bytes.data() + memory.at, n);
  memory.at += n;
  return tmsize_t(n);
}
tmsize_t write_nothing(thandle_t, void*, tmsize_t) { return 0; }
toff_t seek(thandle_t handle, toff_t to, int from) {
  Memory& memory = memory_of(handle);
  return memory.at = to + (from == SEEK_CUR ? memory.at : from == SEEK_END ? memory.bytes.size() : 0);
}
int close_nothing(thandle_t) { return 0; }
toff_t size_of(thandle_t handle) { return memory_of(handle).bytes.size(); }

// libtiff's handlers belong to the process and know no file: the last message of this thread is kept, none is printed.
thread_local char last_error[200];
void keep_error(const char*, const char* format, va_list arguments) {
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
}
void handle_messages() {
  static const bool done = [] {
    TIFFSetErrorHandler(keep_error);
    TIFFSetWarningHandler(nullptr);
    return true;
  }();
  (void)done;
}

}  // namespace

bool is_tiff(std::string_view bytes) {
  const auto magic = bytes.substr(0, 4);
  return magic == std::string_view("II*\0", 4) || magic == std::string_view("MM\0*", 4) ||
         magic == std::string_view("II+\0", 4) || magic == std::string_view("MM\0+", 4);
}

Pixels decode_tiff(std::string_view bytes, const std::string& name) {
  handle_messages();
  std::snprintf(last_error, sizeof last_error, "damaged");
  Memory memory{bytes};
  const std::unique_ptr<TIFF, decltype(&TIFFClose)> tiff(
      TIFFClientOpen("", "rm", &memory, read_bytes, write_nothing, seek, close_nothing, size_of, nullptr, nullptr),
      TIFFClose);
  MOEGRAFT_CHECK(tiff != nullptr, name, ": cannot decode TIFF: ", last_error);
  uint32_t width = 0, height = 0, tile_width = 1, tile_height = 1;
  uint16_t samples = 1, bits = 1, orientation = 1;
  TIFFGetField(tiff.get(), TIFFTAG_IMAGEWIDTH, &width);
  TIFFGetField(tiff.get(), TIFFTAG_IMAGELENGTH, &height);
  check_picture_size(width, height, name);
  if (TIFFIsTiled(tiff.get())) {
    TIFFGetField(tiff.get(), TIFFTAG_TILEWIDTH, &tile_width);
    TIFFGetField(tiff.get(), TIFFTAG_TILELENGTH, &tile_height);
    check_picture_size(tile_width, tile_height, name + ": a tile");
  }
  TIFFGetFieldDefaulted(tiff.get(), TIFFTAG_SAMPLESPERPIXEL, &samples);
  TIFFGetFieldDefaulted(tiff.get(), TIFFTAG_BITSPERSAMPLE, &bits);
  MOEGRAFT_CHECK(uint64_t(samples) * bits <= kMostBits, name, ": TIFF with ", samples, " samples of ", bits,
                 " bits a pixel, at most ", kMostBits, " bits are read");
  TIFFGetFieldDefaulted(tiff.get(), TIFFTAG_ORIENTATION, &orientation);

  // Asked for the orientation it has, libtiff turns nothing: the rows come as they are stored.
  std::vector<uint32_t> rgba(size_t(width) * height);
  MOEGRAFT_CHECK(
      TIFFReadRGBAImageOriented(tiff.get(), width, height, rgba.data(), orientation, /*stop_on_error=*/1) != 0, name,
      ": cannot decode TIFF: ", last_error);
  Pixels pixels{width, height, {}, orientation >= 1 && orientation <= 8 ? orientation : 1};
  pixels.rgb.resize(3 * rgba.size());
  for (size_t i = 0; i < rgba.size(); ++i) {
    const uint32_t white = 255 - TIFFGetA(rgba[i]);  // colours come multiplied by alpha
    pixels.rgb[3 * i] = uint8_t(std::min<uint32_t>(255, TIFFGetR(rgba[i]) + white));
    pixels.rgb[3 * i + 1] = uint8_t(std::min<uint32_t>(255, TIFFGetG(rgba[i]) + white));
    pixels.rgb[3 * i + 2] = uint8_t(std::min<uint32_t>(255, TIFFGetB(rgba[i]) + white));
  }
  return pixels;
}

}  // namespace moegraft::io
