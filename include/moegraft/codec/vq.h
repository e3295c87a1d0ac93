#pragma once
// "moegraft_vq": the small VQ codec that `moegraft codec train` makes. Convolutions up to the code grid, a vector
// quantiser, and a decoder that spends its work on the code grid, where position-mixing layers see the whole picture.

#include <string>
#include <utility>
#include <vector>

#include "moegraft/codec/codec.h"
#include "moegraft/config/config.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::codec {

struct VqConfig {
  int64_t image_size = 36;
  int64_t patch = 3;
  std::vector<int64_t> channels = {64, 128};
  std::vector<int64_t> encoder_blocks = {1, 1};
  std::vector<int64_t> decoder_blocks = {1, 1};
  int64_t mixer_blocks = 3;
  int64_t mixer_width = 192;
  int64_t codebook_size = 512;
  int64_t code_width = 16;
  std::string fit = "pad";
  template <class V>
  void visit_fields(V& v) {
    v("image_size", image_size, config::range(4, 1024), "Pixels a side.");
    v("patch", patch, config::range(1, 64), "Pixels a side of the patches that become channels at the first level.");
    v("channels", channels, config::any(),
      "Channels of each level; every level after the first halves the resolution. The last one is the code grid.");
    v("encoder_blocks", encoder_blocks, config::any(), "Residual convolution blocks of the encoder at each level.");
    v("decoder_blocks", decoder_blocks, config::any(), "Residual convolution blocks of the decoder at each level.");
    v("mixer_blocks", mixer_blocks, config::range(0, 64),
      "Decoder blocks on the code grid that mix all positions, then channels.");
    v("mixer_width", mixer_width, config::range(1, 8192), "Channels of the mixer blocks.");
    v("codebook_size", codebook_size, config::range(2, 1 << 20), "Codes.");
    v("code_width", code_width, config::range(1, 4096), "Numbers a code.");
    v("fit", fit, config::one_of({"pad", "crop"}),
      "How a picture of another shape is fitted: pad (whole, on white) or crop.");
  }
  void validate(const std::string& path) const;
  int64_t grid() const;  // codes a side: this architecture's are a square, one codebook
  CodeShape shape() const { return {{grid(), grid()}}; }
};

// A parameter map with a fixed order: the network is a pure function of it.
using ParameterList = std::vector<std::pair<std::string, at::Tensor>>;

class VqCodec final : public ImageCodec {
 public:
  VqCodec(VqConfig config, uint64_t seed);  // random weights, a function of the seed alone
  VqCodec(VqConfig config, const io::TensorMap& tensors,
          const std::string& source);  // UserError: a tensor missing, extra or misshapen
  static std::unique_ptr<VqCodec> load(const std::filesystem::path& dir);
  // Writes dir/config.json and dir/model.safetensors; each is complete or absent, and config.json, which makes the
  // folder a codec, comes last.
  void save(const std::filesystem::path& dir) const;

  std::string architecture() const override { return "moegraft_vq"; }
  int64_t image_size() const override { return config_.image_size; }
  CodeShape shape() const override { return config_.shape(); }
  int64_t codebook_size() const override { return config_.codebook_size; }
  at::Tensor codebook_NZ() const override { return codebook_NZ_; }
  std::string fit() const override { return config_.fit; }
  at::Tensor encode(const at::Tensor& pixels_B3HW) const override;
  at::Tensor decode(const at::Tensor& ids_BL) const override;
  void to(at::Device device) override;

  // The differentiable pieces, for training.
  at::Tensor embed(
      const at::Tensor& pixels_B3HW) const;           // -> z [B, item_length, d_z], each vector of root mean square 1
  at::Tensor nearest(const at::Tensor& z_BLZ) const;  // -> ids int64 [B, item_length]; not differentiable
  at::Tensor render(const at::Tensor& z_BLZ) const;   // -> pixels [B,3,H,W], not clamped
  ParameterList encoder_parameters() const;
  ParameterList decoder_parameters() const;
  void set_codebook(const at::Tensor& codebook_NZ);
  // Type of the products: float32 (the default, and what encode and decode should use) or bfloat16 with float32 sums
  // between them. For bfloat16 this call makes copies of the weights, once for all that follows: repeat it when the
  // weights have changed.
  void set_compute(at::ScalarType type);
  // What the products read in a parameter's place: its copy, where there is one, which is then the leaf that receives
  // the gradient.
  const at::Tensor& working(const std::string& name) const;
  const VqConfig& config() const { return config_; }

 private:
  const at::Tensor& parameter(const std::string& name) const;
  at::Tensor conv(const std::string& name, const at::Tensor& x_BHWC, int64_t stride = 1) const;
  at::Tensor linear(const std::string& name, const at::Tensor& x) const;
  at::Tensor mix(const std::string& name, const at::Tensor& x_BLC) const;  // a product over positions
  at::Tensor norm(const std::string& name, const at::Tensor& x) const;
  at::Tensor residual(const std::string& name, const at::Tensor& x_BHWC) const;
  at::Tensor mixer(const std::string& name, const at::Tensor& x_BLC) const;
  VqConfig config_;
  io::TensorMap parameters_, working_;
  at::Tensor codebook_NZ_;
  at::ScalarType compute_ = at::kFloat;
};

}  // namespace moegraft::codec
