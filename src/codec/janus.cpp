#include "janus.h"

#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"
#include "weights.h"

namespace moegraft::codec {
namespace {

constexpr int64_t kGroups = 32;  // fixed in transformers' JanusVQVAE
constexpr double kGroupEpsilon = 1e-6;

struct JanusConfig {
  int64_t embed_dim = 8, num_embeddings = 16384, latent_channels = 256, in_channels = 3, out_channels = 3,
          base_channels = 128, num_res_blocks = 2, num_patches = 32;
  std::vector<int64_t> channel_multiplier = {1, 1, 2, 2, 4};
  bool double_latent = false;
  int64_t levels() const { return int64_t(channel_multiplier.size()); }
  int64_t width(int64_t level) const { return base_channels * channel_multiplier[size_t(level)]; }
};

// Absent keys keep transformers' defaults; its config files leave defaults out at times.
JanusConfig parse(const io::Json& json, const std::string& source) {
  JanusConfig c;
  auto integer = [&](const char* key, int64_t& value, int64_t high) {
    if (!json.contains(key)) return;
    MOEGRAFT_CHECK(json[key].is_number_integer(), source, ": \"", key, "\" must be an integer");
    value = json[key].get<int64_t>();
    MOEGRAFT_CHECK(value >= 1 && value <= high, source, ": \"", key, "\" must be in [1, ", high, "], got ", value);
  };
  integer("embed_dim", c.embed_dim, 65536), integer("num_embeddings", c.num_embeddings, 1 << 24),
      integer("latent_channels", c.latent_channels, 65536);
  integer("in_channels", c.in_channels, 3), integer("out_channels", c.out_channels, 3),
      integer("base_channels", c.base_channels, 65536);
  integer("num_res_blocks", c.num_res_blocks, 64), integer("num_patches", c.num_patches, 4096);
  if (json.contains("channel_multiplier")) {
    MOEGRAFT_CHECK(json["channel_multiplier"].is_array() && !json["channel_multiplier"].empty() &&
                       json["channel_multiplier"].size() <= 12,
                   source, ": \"channel_multiplier\" must be a list of 1 to 12 integers");
    c.channel_multiplier.clear();
    for (const auto& v : json["channel_multiplier"]) {
      MOEGRAFT_CHECK(v.is_number_integer() && v.get<int64_t>() >= 1 && v.get<int64_t>() <= 1024, source,
                     ": \"channel_multiplier\" entries must be in [1, 1024]");
      c.channel_multiplier.push_back(v.get<int64_t>());
    }
  }
  if (json.contains("double_latent")) {
    MOEGRAFT_CHECK(json["double_latent"].is_boolean(), source, ": \"double_latent\" must be true or false");
    c.double_latent = json["double_latent"].get<bool>();
  }
  MOEGRAFT_CHECK(!c.double_latent, source,
                 ": double_latent true is not a codec transformers can run either (its quant_conv expects "
                 "latent_channels); use false");
  MOEGRAFT_CHECK(c.in_channels == 3 && c.out_channels == 3, source, ": only RGB is supported, got in_channels ",
                 c.in_channels, ", out_channels ", c.out_channels);
  for (int64_t level = 0; level < c.levels(); ++level)
    MOEGRAFT_CHECK(c.width(level) % kGroups == 0 && c.base_channels % kGroups == 0, source,
                   ": every level's channels must be a multiple of ", kGroups, ", got ", c.base_channels, " x ",
                   c.channel_multiplier);
  return c;
}

class JanusCodec final : public ImageCodec {
 public:
  JanusCodec(JanusConfig config, const io::TensorMap& tensors, std::string prefix, std::string source)
      : config_(std::move(config)), prefix_(std::move(prefix)), source_(std::move(source)) {
    load(tensors);
  }
  std::string architecture() const override { return "janus_vqgan"; }
  int64_t image_size() const override { return config_.num_patches << (config_.levels() - 1); }
  CodeShape shape() const override { return {{config_.num_patches, config_.num_patches}}; }
  int64_t codebook_size() const override { return config_.num_embeddings; }
  at::Tensor codebook_NZ() const override { return parameters_.at("quantize.embedding.weight"); }

  at::Tensor encode(const at::Tensor& pixels_B3HW) const override {
    check_pixels(pixels_B3HW);
    at::NoGradGuard no_grad;
    const auto codebook = codebook_NZ();
    auto z = conv("quant_conv", encoder(pixels_B3HW.to(codebook.device()) * 2 - 1), 0);
    z = z.permute({0, 2, 3, 1}).reshape({-1, config_.embed_dim});
    // Raw vectors, as transformers compares them; only decode normalises. |z|^2 stays so that near-ties round as there.
    const auto distance = z.square().sum(1, true) + codebook.square().sum(1) - 2 * at::matmul(z, codebook.t());
    return distance.argmin(1).view({pixels_B3HW.size(0), item_length()});
  }

  at::Tensor decode(const at::Tensor& ids_BL) const override {
    check_ids(ids_BL);
    at::NoGradGuard no_grad;
    const auto codebook = codebook_NZ();
    auto z = codebook.index({ids_BL.to(codebook.device())});
    z = z / z.norm(2, -1, true).clamp_min(1e-12);
    z = z.view({ids_BL.size(0), config_.num_patches, config_.num_patches, config_.embed_dim})
            .permute({0, 3, 1, 2})
            .contiguous();
    return decoder(conv("post_quant_conv", z, 0)).mul_(0.5).add_(0.5).clamp_(0, 1);
  }

  void to(at::Device device) override {
    for (auto& [name, tensor] : parameters_) tensor = tensor.to(device);
  }

 private:
  // ---- forward: the network of LlamaGen's VQ-16 (arXiv:2406.06525), a VQGAN
  const at::Tensor& parameter(const std::string& name) const {
    const auto found = parameters_.find(name);
    MOEGRAFT_INVARIANT(found != parameters_.end(), "codec parameter ", name);
    return found->second;
  }
  at::Tensor conv(const std::string& name, const at::Tensor& x, int64_t padding, int64_t stride = 1) const {
    return at::conv2d(x, parameter(name + ".weight"), parameter(name + ".bias"), stride, padding);
  }
  at::Tensor norm(const std::string& name, const at::Tensor& x) const {
    return at::group_norm(x, kGroups, parameter(name + ".weight"), parameter(name + ".bias"), kGroupEpsilon);
  }
  at::Tensor residual(const std::string& name, const at::Tensor& x) const {
    auto h = conv(name + ".conv1", at::silu(norm(name + ".norm1", x)), 1);
    h = conv(name + ".conv2", at::silu(norm(name + ".norm2", h)), 1);
    return (parameters_.count(name + ".nin_shortcut.weight") ? conv(name + ".nin_shortcut", x, 0) : x) + h;
  }
  at::Tensor attention(const std::string& name, const at::Tensor& x) const {
    const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
    const auto h = norm(name + ".norm", x);
    const auto q = conv(name + ".q", h, 0).reshape({B, C, H * W}).transpose(1, 2),
               k = conv(name + ".k", h, 0).reshape({B, C, H * W});
    const auto v = conv(name + ".v", h, 0).reshape({B, C, H * W});
    const auto weights = at::softmax(at::bmm(q, k) * std::pow(double(C), -0.5), 2);
    return x + conv(name + ".proj_out", at::bmm(v, weights.transpose(1, 2)).reshape({B, C, H, W}), 0);
  }
  at::Tensor middle(const std::string& name, const at::Tensor& x) const {
    return residual(name + ".block_2", attention(name + ".attn_1", residual(name + ".block_1", x)));
  }

  at::Tensor encoder(const at::Tensor& pixels) const {
    auto x = conv("encoder.conv_in", pixels, 1);
    for (int64_t level = 0; level < config_.levels(); ++level) {
      const std::string at = "encoder.down." + std::to_string(level);
      const bool last = level + 1 == config_.levels();
      for (int64_t i = 0; i < config_.num_res_blocks; ++i) {
        x = residual(at + ".block." + std::to_string(i), x);
        if (last) x = attention(at + ".attn." + std::to_string(i), x);
      }
      if (!last)
        x = conv(at + ".downsample.conv", at::constant_pad_nd(x, {0, 1, 0, 1}), 0,
                 2);  // padded on the right and bottom only
    }
    return conv("encoder.conv_out", at::silu(norm("encoder.norm_out", middle("encoder.mid", x))), 1);
  }

  at::Tensor decoder(const at::Tensor& latent) const {
    auto x = middle("decoder.mid", conv("decoder.conv_in", latent, 1));
    for (int64_t step = 0; step < config_.levels(); ++step) {  // decoder.up.0 is the coarsest level
      const std::string at = "decoder.up." + std::to_string(step);
      for (int64_t i = 0; i <= config_.num_res_blocks; ++i) {
        x = residual(at + ".block." + std::to_string(i), x);
        if (step == 0) x = attention(at + ".attn." + std::to_string(i), x);
      }
      if (step + 1 < config_.levels())
        x = conv(at + ".upsample.conv", at::upsample_nearest2d(x, at::IntArrayRef({2 * x.size(2), 2 * x.size(3)})), 1);
    }
    return conv("decoder.conv_out", at::silu(norm("decoder.norm_out", x)), 1);
  }

  // ---- loading: the same walk, checking each tensor's shape
  void load(const io::TensorMap& tensors) {
    auto take = [&](const std::string& name, std::vector<int64_t> shape) {
      parameters_[name] = take_weight(tensors, prefix_ + name, shape, source_);
    };
    auto conv = [&](const std::string& name, int64_t in, int64_t out, int64_t kernel) {
      take(name + ".weight", {out, in, kernel, kernel});
      take(name + ".bias", {out});
    };
    auto norm = [&](const std::string& name, int64_t width) {
      take(name + ".weight", {width});
      take(name + ".bias", {width});
    };
    auto residual = [&](const std::string& name, int64_t in, int64_t out) {
      norm(name + ".norm1", in), conv(name + ".conv1", in, out, 3), norm(name + ".norm2", out),
          conv(name + ".conv2", out, out, 3);
      if (in != out) conv(name + ".nin_shortcut", in, out, 1);
    };
    auto attention = [&](const std::string& name, int64_t width) {
      norm(name + ".norm", width);
      for (const char* part : {".q", ".k", ".v", ".proj_out"}) conv(name + part, width, width, 1);
    };
    auto middle = [&](const std::string& name, int64_t width) {
      residual(name + ".block_1", width, width), attention(name + ".attn_1", width),
          residual(name + ".block_2", width, width);
    };
    const auto& c = config_;
    const int64_t levels = c.levels(), coarse = c.width(levels - 1);
    take("quantize.embedding.weight", {c.num_embeddings, c.embed_dim});
    conv("quant_conv", c.latent_channels, c.embed_dim, 1), conv("post_quant_conv", c.embed_dim, c.latent_channels, 1);

    int64_t width = c.base_channels;
    conv("encoder.conv_in", 3, width, 3);
    for (int64_t level = 0; level < levels; ++level) {
      const std::string at = "encoder.down." + std::to_string(level);
      for (int64_t i = 0; i < c.num_res_blocks; ++i) {
        residual(at + ".block." + std::to_string(i), width, c.width(level));
        width = c.width(level);
        if (level + 1 == levels) attention(at + ".attn." + std::to_string(i), width);
      }
      if (level + 1 < levels) conv(at + ".downsample.conv", width, width, 3);
    }
    middle("encoder.mid", coarse), norm("encoder.norm_out", coarse),
        conv("encoder.conv_out", coarse, c.latent_channels, 3);

    conv("decoder.conv_in", c.latent_channels, coarse, 3), middle("decoder.mid", coarse);
    width = coarse;
    for (int64_t step = 0; step < levels; ++step) {
      const std::string at = "decoder.up." + std::to_string(step);
      const int64_t out = c.width(levels - 1 - step);
      for (int64_t i = 0; i <= c.num_res_blocks; ++i) {
        residual(at + ".block." + std::to_string(i), width, out);
        width = out;
        if (step == 0) attention(at + ".attn." + std::to_string(i), width);
      }
      if (step + 1 < levels) conv(at + ".upsample.conv", width, width, 3);
    }
    norm("decoder.norm_out", width), conv("decoder.conv_out", width, 3, 3);
  }

  JanusConfig config_;
  std::string prefix_, source_;
  io::TensorMap parameters_;
};

}  // namespace

std::unique_ptr<ImageCodec> load_janus(const std::filesystem::path& dir) {
  const auto path = dir / "config.json";
  io::Json json = io::read_json(path);
  if (json.value("model_type", "") == "janus") {
    MOEGRAFT_CHECK(json.contains("vq_config") && json["vq_config"].is_object(), path.string(),
                   ": a janus checkpoint needs \"vq_config\"");
    io::Json vq = json["vq_config"];
    // transformers takes the code grid from the vision tower, whatever vq_config says.
    if (json.contains("vision_config") && json["vision_config"].is_object()) {
      const int64_t size = json["vision_config"].value("image_size", int64_t{384}),
                    patch = json["vision_config"].value("patch_size", int64_t{16});
      MOEGRAFT_CHECK(patch >= 1 && size >= patch, path.string(),
                     ": vision_config.image_size and patch_size do not fit: ", size, ", ", patch);
      vq["num_patches"] = size / patch;
    }
    json = std::move(vq);
  }
  auto tensors = read_weights(dir);
  const std::string source = (dir / "model.safetensors").string(), probe = "quantize.embedding.weight";
  for (const std::string prefix : {"", "model.vqmodel.", "vqmodel.", "model.vqmodel.model."})
    if (tensors.count(prefix + probe))
      return std::make_unique<JanusCodec>(parse(json, path.string()), tensors, prefix, source);
  fail(source, ": no ", probe, " here, nor below model.vqmodel.; expected the weights of transformers' JanusVQVAE");
}

}  // namespace moegraft::codec
