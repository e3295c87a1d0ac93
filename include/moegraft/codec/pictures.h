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

// source: a JSONL manifest ({"image": path relative to the manifest's folder, …} per line; lines without an image are passed over), a folder of
// PNG/JPEG files (sorted by name, not recursive), or one picture. fit: "pad" or "crop". A picture that does not decode is named, skipped and counted.
// UserError: source missing, a line that is no JSON object, no picture left, more than max_bytes of pixels.
Pictures load_pictures(const std::filesystem::path& source, int64_t size, const std::string& fit, int64_t max_bytes = int64_t{8} << 30);

// uint8 rows -> float32 in [0,1], channels-last.
at::Tensor to_float(const at::Tensor& pixels_B3HW);

}  // namespace moegraft::codec
