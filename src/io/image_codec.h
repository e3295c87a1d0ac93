#pragma once
// PNG and JPEG bytes <-> interleaved 8-bit RGB, through libpng and libjpeg. Without Torch: setjmp needs plain functions.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moegraft::io {

struct Pixels {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> rgb;  // height x width x 3
  int orientation = 1;       // EXIF: 1..8, how to turn the picture before showing it
};

// Alpha is composited on white, 16 bits are scaled to 8, CMYK becomes RGB. UserError names `name` and the decoder's reason.
Pixels decode_png(std::string_view bytes, const std::string& name);
Pixels decode_jpeg(std::string_view bytes, const std::string& name);
std::string encode_png(const Pixels& pixels);
std::string encode_jpeg(const Pixels& pixels, int quality);

}  // namespace moegraft::io
