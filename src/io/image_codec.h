#pragma once
// Bytes of pictures <-> interleaved 8-bit RGB: PNG, JPEG and TIFF through libpng, libjpeg and libtiff, what else is
// read through libgd. Without Torch: setjmp needs plain functions.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moegraft::io {

struct Pixels {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> rgb;  // height x width x 3
  int orientation = 1;       // EXIF: 1..8, how to turn the picture before showing it
};

// Alpha is composited on white, 16 bits are scaled to 8, CMYK becomes RGB. UserError names `name` and the decoder's
// reason.
Pixels decode_png(std::string_view bytes, const std::string& name);
Pixels decode_jpeg(std::string_view bytes, const std::string& name);
bool is_tiff(std::string_view bytes);
Pixels decode_tiff(std::string_view bytes, const std::string& name);  // the first page
// WebP, GIF (the first frame) and BMP: alpha in 128 steps on white. none: another format.
std::optional<Pixels> decode_other(std::string_view bytes, const std::string& name);
std::string encode_png(const Pixels& pixels);
std::string encode_jpeg(const Pixels& pixels, int quality);

// At most 2^27 pixels are read: a small file may claim far more than memory holds. UserError.
void check_picture_size(int64_t width, int64_t height, const std::string& name);
// Of an EXIF block, which is a small TIFF file: 1..8; 1 when it does not say.
int tiff_orientation(const uint8_t* tiff, size_t size);

}  // namespace moegraft::io
