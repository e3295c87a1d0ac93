#include "moegraft/codec/codec.h"

#include "libtorch.h"

#include "janus.h"
#include "moegraft/base/check.h"
#include "moegraft/codec/vq.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"

namespace moegraft::codec {

at::Tensor ImageCodec::prepare(const at::Tensor& image_3HW) const {
  return fit() == "pad" ? io::resize_and_pad(image_3HW, image_size()) : io::resize_and_crop(image_3HW, image_size());
}

void ImageCodec::check_pixels(const at::Tensor& x) const {
  MOEGRAFT_CHECK(x.dim() == 4 && x.size(1) == 3 && x.size(2) == image_size() && x.size(3) == image_size(), "codec ", architecture(),
                 " encodes pixels [B, 3, ", image_size(), ", ", image_size(), "], got ", x.sizes().vec(), "; resize the picture first");
  MOEGRAFT_CHECK(x.scalar_type() == at::kFloat, "codec ", architecture(), " encodes float32 pixels in [0, 1], got ", toString(x.scalar_type()));
}

void ImageCodec::check_ids(const at::Tensor& ids) const {
  const int64_t length = grid() * grid();
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.size(1) == length, "codec ", architecture(), " decodes ids [B, ", length, "], got ", ids.sizes().vec());
  MOEGRAFT_CHECK(ids.scalar_type() == at::kLong, "codec ", architecture(), " decodes int64 ids, got ", toString(ids.scalar_type()));
  if (ids.numel() == 0) return;
  const int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  MOEGRAFT_CHECK(low >= 0 && high < codebook_size(), "image code ", low < 0 ? low : high, " is outside the codebook [0, ", codebook_size(), ")");
}

std::unique_ptr<ImageCodec> load_codec(const std::filesystem::path& dir) {
  MOEGRAFT_CHECK(std::filesystem::is_directory(dir), "codec folder ", dir.string(), " does not exist; make one with `moegraft codec train`");
  const auto path = dir / "config.json";
  const io::Json config = io::read_json(path);
  MOEGRAFT_CHECK(config.is_object(), path.string(), ": expected an object");
  // Ours says "architecture"; transformers says "model_type".
  const std::string key = config.contains("architecture") ? "architecture" : "model_type";
  MOEGRAFT_CHECK(config.contains(key) && config[key].is_string(), path.string(), ": no \"architecture\" (or transformers' \"model_type\"); known: moegraft_vq, janus_vqgan, janus");
  const std::string name = config[key];
  if (name == "moegraft_vq") return VqCodec::load(dir);
  if (name == "janus_vqgan" || name == "janus") return load_janus(dir);
  fail(path.string(), ": unknown codec architecture \"", name, "\"; known: moegraft_vq, janus_vqgan, janus");
}

}  // namespace moegraft::codec
