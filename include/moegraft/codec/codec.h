#pragma once
// An image codec turns pixels into discrete ids and back. Architectures sit behind this interface; config.json names one.

#include <torch/types.h>

#include <filesystem>
#include <memory>
#include <string>

namespace moegraft::codec {

class ImageCodec {
 public:
  virtual ~ImageCodec() = default;
  virtual std::string architecture() const = 0;  // "moegraft_vq", "janus_vqgan", …
  virtual int64_t image_size() const = 0;        // pixels a side that encode() expects
  virtual int64_t grid() const = 0;              // codes a side: grid*grid ids an image
  virtual int64_t codebook_size() const = 0;     // N
  virtual at::Tensor codebook_NZ() const = 0;    // float32 [N, d_z], as compared with by encode
  // How a picture of another shape becomes image_size × image_size: "crop" (fill and cut the sides) or "pad" (whole, on white).
  virtual std::string fit() const { return "crop"; }
  // pixels_B3HW float32 in [0,1] -> ids int64 [B, grid*grid], row-major. UserError on another shape or dtype.
  virtual at::Tensor encode(const at::Tensor& pixels_B3HW) const = 0;
  // ids int64 [B, grid*grid] -> pixels float32 [B,3,H,W], clamped to [0,1]. UserError on another shape or an id outside [0, N).
  virtual at::Tensor decode(const at::Tensor& ids_BL) const = 0;
  virtual void to(at::Device device) = 0;

  // Any RGB picture (uint8 or float in [0,1]) -> float32 [3,image_size,image_size] as encode expects, by fit().
  at::Tensor prepare(const at::Tensor& image_3HW) const;

 protected:
  void check_pixels(const at::Tensor& pixels_B3HW) const;
  void check_ids(const at::Tensor& ids_BL) const;
};

// Reads <dir>/config.json + model.safetensors (or its shards). UserError: unknown architecture (known ones named), missing or misshapen tensors.
std::unique_ptr<ImageCodec> load_codec(const std::filesystem::path& dir);

}  // namespace moegraft::codec
