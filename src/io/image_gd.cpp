// WebP, GIF and BMP through libgd. It trusts the sizes that a file claims, so they are read and checked here first.
#include <gd.h>

#include <climits>
#include <cstring>
#include <memory>

#include "image_codec.h"
#include "moegraft/base/check.h"

namespace moegraft::io {
namespace {

struct Size {
  int64_t width, height;
};

uint64_t little(std::string_view bytes, size_t at, int count) {
  uint64_t value = 0;
  for (int i = 0; i < count; ++i)
    if (at + size_t(i) < bytes.size()) value |= uint64_t(static_cast<unsigned char>(bytes[at + size_t(i)])) << 8 * i;
  return value;
}

bool is_webp(std::string_view b) { return b.size() >= 30 && b.starts_with("RIFF") && b.substr(8, 4) == "WEBP"; }
bool is_gif(std::string_view b) { return b.starts_with("GIF87a") || b.starts_with("GIF89a"); }
bool is_bmp(std::string_view b) { return b.starts_with("BM") && b.size() >= 26; }

Size webp_size(std::string_view b) {
  const auto kind = b.substr(12, 4);
  if (kind == "VP8X") return {int64_t(little(b, 24, 3)) + 1, int64_t(little(b, 27, 3)) + 1};
  if (kind == "VP8L") return {int64_t(little(b, 21, 4) & 0x3fff) + 1, int64_t(little(b, 21, 4) >> 14 & 0x3fff) + 1};
  return {int64_t(little(b, 26, 2) & 0x3fff), int64_t(little(b, 28, 2) & 0x3fff)};
}
Size gif_size(std::string_view b) { return {int64_t(little(b, 6, 2)), int64_t(little(b, 8, 2))}; }
Size bmp_size(std::string_view b) {
  if (little(b, 14, 4) == 12) return {int64_t(little(b, 18, 2)), int64_t(little(b, 20, 2))};
  const auto height = int64_t(int32_t(uint32_t(little(b, 22, 4))));  // negative: from the top
  return {int64_t(int32_t(uint32_t(little(b, 18, 4)))), height < 0 ? -height : height};
}

int webp_orientation(std::string_view b) {
  for (size_t at = 12; at + 8 <= b.size();) {
    const uint64_t length = little(b, at + 4, 4);
    if (length > b.size() - at - 8) return 1;
    if (b.substr(at, 4) == "EXIF") {
      std::string_view exif = b.substr(at + 8, length);
      if (exif.starts_with(std::string_view("Exif\0\0", 6))) exif.remove_prefix(6);
      return tiff_orientation(reinterpret_cast<const uint8_t*>(exif.data()), exif.size());
    }
    at += 8 + length + (length & 1);
  }
  return 1;
}
int upright(std::string_view) { return 1; }

struct Format {
  const char* name;
  bool (*is)(std::string_view);
  Size (*size)(std::string_view);
  int (*orientation)(std::string_view);
  gdImagePtr (*decode)(int, void*);
};
constexpr Format kFormats[] = {
    {"WebP", is_webp, webp_size, webp_orientation, gdImageCreateFromWebpPtr},
    {"GIF", is_gif, gif_size, upright, gdImageCreateFromGifPtr},
    {"BMP", is_bmp, bmp_size, upright, gdImageCreateFromBmpPtr},
};

void silent(int, const char*, va_list) {}

uint8_t on_white(int value, int transparency) {  // 0 opaque, 127 clear
  return uint8_t((value * (127 - transparency) + 255 * transparency + 63) / 127);
}

}  // namespace

std::optional<Pixels> decode_other(std::string_view bytes, const std::string& name) {
  for (const Format& format : kFormats) {
    if (!format.is(bytes)) continue;
    const Size size = format.size(bytes);
    check_picture_size(size.width, size.height, name);
    MOEGRAFT_CHECK(bytes.size() <= size_t(INT_MAX), name, ": a ", format.name, " file of ", bytes.size(),
                   " bytes is not read");
    gdSetErrorMethod(silent);
    const std::unique_ptr<gdImage, decltype(&gdImageDestroy)> image(
        format.decode(int(bytes.size()), const_cast<char*>(bytes.data())), gdImageDestroy);
    MOEGRAFT_CHECK(image != nullptr, name, ": not a whole ", format.name,
                   " picture, or of a kind that is not read (animated?)");
    Pixels pixels{gdImageSX(image), gdImageSY(image), {}, format.orientation(bytes)};
    pixels.rgb.resize(size_t(3 * pixels.width * pixels.height));
    uint8_t* out = pixels.rgb.data();
    for (int y = 0; y < gdImageSY(image); ++y)
      for (int x = 0; x < gdImageSX(image); ++x) {
        const int c = gdImageGetTrueColorPixel(image.get(), x, y), clear = gdTrueColorGetAlpha(c);
        *out++ = on_white(gdTrueColorGetRed(c), clear);
        *out++ = on_white(gdTrueColorGetGreen(c), clear);
        *out++ = on_white(gdTrueColorGetBlue(c), clear);
      }
    return pixels;
  }
  return {};
}

}  // namespace moegraft::io
