#pragma once
// A codec turns what a modality is made of into discrete codes and back. Architectures sit behind this interface;
// config.json names one.

#include <torch/types.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moegraft/codec/code_shape.h"

namespace moegraft::codec {

// What vocabularies, shards, losses and generation know of a codec: how many codes there are and how an item's lie.
class Codec {
 public:
  virtual ~Codec() = default;
  virtual std::string architecture() const = 0;  // "moegraft_vq", "janus_vqgan", …
  virtual CodeShape shape() const = 0;
  virtual int64_t codebook_size() const = 0;  // N, of each codebook
  // float32 [num_codes, d_z], as compared with by encode: the codebooks one below the other.
  virtual at::Tensor codebook_NZ() const = 0;
  virtual void to(at::Device device) = 0;

  int64_t item_length() const { return shape().item_length(); }
  int64_t num_codes() const { return shape().codebooks * codebook_size(); }

 protected:
  // ids: int64 [B, item_length], each of its place's codebook. UserError names what differs.
  void check_ids(const at::Tensor& ids_BL) const;
};

class ImageCodec : public Codec {
 public:
  virtual int64_t image_size() const = 0;  // pixels a side that encode() expects
  // How a picture of another shape becomes image_size × image_size: "crop" (fill and cut the sides) or "pad" (whole, on
  // white).
  virtual std::string fit() const { return "crop"; }
  // pixels_B3HW float32 in [0,1] -> ids int64 [B, item_length], laid out as code_shape.h says. UserError on another
  // shape or dtype.
  virtual at::Tensor encode(const at::Tensor& pixels_B3HW) const = 0;
  // ids int64 [B, item_length] -> pixels float32 [B,3,H,W], clamped to [0,1]. UserError on another shape or an id
  // outside its codebook.
  virtual at::Tensor decode(const at::Tensor& ids_BL) const = 0;

  // Any RGB picture (uint8 or float in [0,1]) -> float32 [3,image_size,image_size] as encode expects, by fit().
  at::Tensor prepare(const at::Tensor& image_3HW) const;

 protected:
  void check_pixels(const at::Tensor& pixels_B3HW) const;
};

// An architecture that a config.json may name: the value of its "architecture" (ours) or "model_type" (transformers').
struct CodecKind {
  const char* name;
  const char* what;
  std::unique_ptr<ImageCodec> (*load)(const std::filesystem::path& dir);
};
const std::vector<CodecKind>& codec_kinds();

// Reads <dir>/config.json + model.safetensors (or its shards). UserError: an architecture that codec_kinds() does not
// have, missing or misshapen tensors.
std::unique_ptr<ImageCodec> load_codec(const std::filesystem::path& dir);

}  // namespace moegraft::codec
