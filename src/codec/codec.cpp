#include "moegraft/codec/codec.h"

#include "libtorch.h"

#include "janus.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/codec/vq.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"

namespace moegraft::codec {

at::Tensor ImageCodec::prepare(const at::Tensor& image_3HW) const {
  return fit() == "pad" ? io::resize_and_pad(image_3HW, image_size()) : io::resize_and_crop(image_3HW, image_size());
}

void ImageCodec::check_pixels(const at::Tensor& x) const {
  MOEGRAFT_CHECK(x.dim() == 4 && x.size(1) == 3 && x.size(2) == image_size() && x.size(3) == image_size(), "codec ",
                 architecture(), " encodes pixels [B, 3, ", image_size(), ", ", image_size(), "], got ",
                 x.sizes().vec(), "; resize the picture first");
  MOEGRAFT_CHECK(x.scalar_type() == at::kFloat, "codec ", architecture(), " encodes float32 pixels in [0, 1], got ",
                 toString(x.scalar_type()));
}

void Codec::check_ids(const at::Tensor& ids) const {
  const CodeShape s = shape();
  const int64_t length = s.item_length(), N = codebook_size();
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.size(1) == length, "codec ", architecture(), " decodes ids [B, ", length,
                 "], got ", ids.sizes().vec());
  MOEGRAFT_CHECK(ids.scalar_type() == at::kLong, "codec ", architecture(), " decodes int64 ids, got ",
                 toString(ids.scalar_type()));
  if (ids.numel() == 0) return;
  const at::Tensor ids_BPC = ids.reshape({-1, s.num_positions(), s.codebooks});
  for (int64_t c = 0; c < s.codebooks; ++c) {
    const at::Tensor of_codebook = ids_BPC.select(2, c);
    const int64_t low = of_codebook.min().item<int64_t>(), high = of_codebook.max().item<int64_t>(), first = c * N;
    MOEGRAFT_CHECK(low >= first && high < first + N, "code ", low < first ? low : high, " is outside ",
                   s.codebooks > 1 ? detail::concat("codebook ", c, " of ", s.codebooks, ", ") : "the codebook ", "[",
                   first, ", ", first + N, ")");
  }
}

const std::vector<CodecKind>& codec_kinds() {
  static const std::vector<CodecKind> kinds{
      {"moegraft_vq", "the small codec that `moegraft codec train` makes",
       [](const std::filesystem::path& dir) -> std::unique_ptr<ImageCodec> { return VqCodec::load(dir); }},
      {"janus_vqgan", "transformers' JanusVQVAE (LlamaGen's VQ-16)", load_janus},
      {"janus", "the JanusVQVAE inside a Janus checkpoint", load_janus},
  };
  return kinds;
}

std::unique_ptr<ImageCodec> load_codec(const std::filesystem::path& dir) {
  MOEGRAFT_CHECK(std::filesystem::is_directory(dir), "codec folder ", dir.string(),
                 " does not exist; make one with `moegraft codec train`");
  const auto path = dir / "config.json";
  const io::Json config = io::read_json(path);
  MOEGRAFT_CHECK(config.is_object(), path.string(), ": expected an object");
  std::vector<std::string> known;
  for (const auto& kind : codec_kinds()) known.push_back(detail::concat(kind.name, " (", kind.what, ")"));
  // Ours says "architecture"; transformers says "model_type".
  const std::string key = config.contains("architecture") ? "architecture" : "model_type";
  MOEGRAFT_CHECK(config.contains(key) && config[key].is_string(), path.string(),
                 ": no \"architecture\" (or transformers' \"model_type\"); known: ", join(known, ", "));
  const std::string name = config[key];
  for (const auto& kind : codec_kinds())
    if (name == kind.name) return kind.load(dir);
  fail(path.string(), ": unknown codec architecture \"", name, "\"; known: ", join(known, ", "));
}

}  // namespace moegraft::codec
