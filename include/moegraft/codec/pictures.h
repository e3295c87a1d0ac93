#pragma once
// Pictures for training and judging a codec, held in memory as bytes.

#include <torch/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace moegraft::codec {

struct Pictures {
  at::Tensor pixels_N3HW;          // uint8 [N,3,size,size]
  std::vector<std::string> paths;  // N
  int64_t skipped = 0;             // named in a warning each, then counted
};

// source: a folder of PNG/JPEG files (sorted by name, not recursive), one picture, or a data set of any kind that
// io/rows.h lists, whose "image", "file_name" and "images" are taken; rows without are passed over. A row that cannot
// be read and a picture that does not decode is named, skipped and counted. UserError: source missing, no picture left,
// more than max_bytes of pixels.
Pictures load_pictures(const std::filesystem::path& source, int64_t size, const std::string& fit,
                       int64_t max_bytes = int64_t{8} << 30);

// uint8 rows -> float32 in [0,1], channels-last.
at::Tensor to_float(const at::Tensor& pixels_B3HW);

}  // namespace moegraft::codec
