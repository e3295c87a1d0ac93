#include "moegraft/codec/vq.h"

#include "libtorch.h"

#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/io/json.h"
#include "weights.h"

namespace moegraft::codec {
namespace {

constexpr int64_t kExpand = 2;  // hidden width of a mixer block's two products, as a multiple of its input
constexpr double kNormEpsilon = 1e-5;

enum class Init { fan_in, branch, zero, one, half, position };

struct Spec {
  std::string name;
  std::vector<int64_t> shape;
  Init init;
};

// Every parameter of the network, in a fixed order.
std::vector<Spec> parameter_specs(const VqConfig& c) {
  std::vector<Spec> specs;
  auto affine = [&](const std::string& name, std::vector<int64_t> shape, Init init) {
    const int64_t out = shape[0];
    specs.push_back({name + ".weight", std::move(shape), init});
    specs.push_back({name + ".bias", {out}, Init::zero});
  };
  auto norm = [&](const std::string& name, int64_t width) {
    specs.push_back({name + ".weight", {width}, Init::one});
    specs.push_back({name + ".bias", {width}, Init::zero});
  };
  auto residual = [&](const std::string& name, int64_t width) {
    norm(name + ".norm", width);
    affine(name + ".conv", {width, width, 3, 3}, Init::fan_in);
    affine(name + ".out", {width, width}, Init::branch);
  };
  const int64_t patch_values = 3 * c.patch * c.patch, levels = int64_t(c.channels.size()),
                length = c.shape().item_length(), wide = c.mixer_width;

  affine("encoder.in", {c.channels[0], patch_values, 3, 3}, Init::fan_in);
  for (int64_t level = 0; level < levels; ++level) {
    const std::string at = "encoder.level." + std::to_string(level);
    for (int64_t i = 0; i < c.encoder_blocks[level]; ++i)
      residual(at + ".block." + std::to_string(i), c.channels[level]);
    if (level + 1 < levels) affine(at + ".down", {c.channels[level + 1], c.channels[level], 3, 3}, Init::fan_in);
  }
  norm("encoder.norm", c.channels.back());
  affine("encoder.out", {c.code_width, c.channels.back()}, Init::fan_in);

  affine("decoder.in", {wide, c.code_width}, Init::fan_in);
  specs.push_back({"decoder.position", {length, wide}, Init::position});
  for (int64_t i = 0; i < c.mixer_blocks; ++i) {
    const std::string at = "decoder.mixer." + std::to_string(i);
    norm(at + ".position_norm", wide);
    affine(at + ".position_in", {kExpand * length, length}, Init::fan_in);
    affine(at + ".position_out", {length, kExpand * length}, Init::branch);
    norm(at + ".channel_norm", wide);
    affine(at + ".channel_in", {kExpand * wide, wide}, Init::fan_in);
    affine(at + ".channel_out", {wide, kExpand * wide}, Init::branch);
  }
  affine("decoder.grid", {c.channels.back(), wide}, Init::fan_in);
  for (int64_t level = levels - 1; level >= 0; --level) {
    const std::string at = "decoder.level." + std::to_string(level);
    for (int64_t i = 0; i < c.decoder_blocks[level]; ++i)
      residual(at + ".block." + std::to_string(i), c.channels[level]);
    if (level > 0) affine(at + ".up", {4 * c.channels[level - 1], c.channels[level]}, Init::fan_in);
  }
  norm("decoder.norm", c.channels[0]);
  affine("decoder.out", {patch_values, c.channels[0], 3, 3}, Init::branch);
  return specs;
}

at::Tensor initial(const Spec& spec, uint64_t seed) {
  if (spec.init == Init::zero) return at::zeros(spec.shape);
  if (spec.init == Init::one) return at::ones(spec.shape);
  int64_t fan_in = 1;
  for (size_t i = 1; i < spec.shape.size(); ++i) fan_in *= spec.shape[i];
  double scale = 1 / std::sqrt(double(fan_in));
  if (spec.init == Init::branch)
    scale *= 0.2;  // residual branches start small, so that depth does not raise the variance
  if (spec.init == Init::position) scale = 0.2;
  auto generator = at::make_generator<at::CPUGeneratorImpl>(Rng(seed, "codec.init." + spec.name).derive_seed());
  return at::randn(spec.shape, generator).mul_(scale);
}

// [B,H,W,r*r*C] -> [B,H*r,W*r,C]
at::Tensor depth_to_space(const at::Tensor& x, int64_t r) {
  const int64_t B = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3) / (r * r);
  return x.reshape({B, H, W, r, r, C}).permute({0, 1, 3, 2, 4, 5}).reshape({B, H * r, W * r, C});
}

// [B,H*r,W*r,C] -> [B,H,W,r*r*C]
at::Tensor space_to_depth(const at::Tensor& x, int64_t r) {
  const int64_t B = x.size(0), H = x.size(1) / r, W = x.size(2) / r, C = x.size(3);
  return x.reshape({B, H, r, W, r, C}).permute({0, 1, 3, 2, 4, 5}).reshape({B, H, W, r * r * C});
}

}  // namespace

int64_t VqConfig::grid() const { return image_size / (patch << (channels.size() - 1)); }

void VqConfig::validate(const std::string& path) const {
  MOEGRAFT_CHECK_USAGE(!channels.empty() && channels.size() <= 8, path, ".channels must have 1 to 8 entries, got ",
                       channels.size());
  for (const auto* list : {&encoder_blocks, &decoder_blocks}) {
    const char* name = list == &encoder_blocks ? ".encoder_blocks" : ".decoder_blocks";
    MOEGRAFT_CHECK_USAGE(list->size() == channels.size(), path, name,
                         " must have one entry per level as channels has (", channels.size(), "), got ", list->size());
    for (int64_t n : *list) MOEGRAFT_CHECK_USAGE(n >= 0 && n <= 64, path, name, " entries must be in [0, 64], got ", n);
  }
  for (int64_t c : channels)
    MOEGRAFT_CHECK_USAGE(c >= 1 && c <= 8192, path, ".channels entries must be in [1, 8192], got ", c);
  const int64_t cell = patch << (channels.size() - 1);
  MOEGRAFT_CHECK_USAGE(image_size % cell == 0, path, ".image_size must be a multiple of patch * 2^(levels-1) = ", cell,
                       ", got ", image_size);
}

VqCodec::VqCodec(VqConfig config, uint64_t seed) : config_(std::move(config)) {
  config_.validate("codec");
  for (const auto& spec : parameter_specs(config_)) parameters_[spec.name] = initial(spec, seed);
  codebook_NZ_ = initial({"codebook", {config_.codebook_size, config_.code_width}, Init::fan_in}, seed);
}

VqCodec::VqCodec(VqConfig config, const io::TensorMap& tensors, const std::string& source)
    : config_(std::move(config)) {
  config_.validate("codec");
  for (const auto& spec : parameter_specs(config_))
    parameters_[spec.name] = take_weight(tensors, spec.name, spec.shape, source);
  codebook_NZ_ = take_weight(tensors, "codebook", {config_.codebook_size, config_.code_width}, source);
  for (const auto& [name, tensor] : tensors)
    MOEGRAFT_CHECK(parameters_.count(name) || name == "codebook", source, ": unexpected tensor ", name,
                   "; config.json and weights do not belong together");
}

const at::Tensor& VqCodec::parameter(const std::string& name) const {
  const auto found = parameters_.find(name);
  MOEGRAFT_INVARIANT(found != parameters_.end(), "codec parameter ", name);
  return found->second;
}

const at::Tensor& VqCodec::working(const std::string& name) const {
  const auto found = working_.find(name);
  return found != working_.end() ? found->second : parameter(name);
}

void VqCodec::set_compute(at::ScalarType type) {
  compute_ = type;
  working_.clear();
  if (type == at::kFloat) return;
  for (const auto& [name, tensor] : parameters_) {
    const bool product = name != "decoder.position" && tensor.dim() > 1;
    if (!product) continue;
    const std::string bias = name.substr(0, name.rfind(".weight")) + ".bias";
    for (const auto& each : {name, bias}) {
      const auto& master = parameters_.at(each);
      working_[each] = master.detach().to(type).set_requires_grad(master.requires_grad());
    }
  }
}

// Channels-last memory makes NCHW convolutions and [B,H,W,C] products two views of one buffer.
at::Tensor VqCodec::conv(const std::string& name, const at::Tensor& x_BHWC, int64_t stride) const {
  const auto &weight = working(name + ".weight"), &bias = working(name + ".bias");
  const auto x = x_BHWC.to(compute_).permute({0, 3, 1, 2});
  return at::conv2d(x, weight, bias, stride, weight.size(2) / 2).permute({0, 2, 3, 1}).contiguous();
}

at::Tensor VqCodec::linear(const std::string& name, const at::Tensor& x) const {
  return at::linear(x.to(compute_), working(name + ".weight"), working(name + ".bias"));
}

at::Tensor VqCodec::mix(const std::string& name, const at::Tensor& x_BLC) const {
  return at::matmul(working(name + ".weight"), x_BLC.to(compute_)) + working(name + ".bias").unsqueeze(1);
}

at::Tensor VqCodec::norm(const std::string& name, const at::Tensor& x) const {
  return at::layer_norm(x, {x.size(-1)}, parameter(name + ".weight"), parameter(name + ".bias"), kNormEpsilon);
}

at::Tensor VqCodec::residual(const std::string& name, const at::Tensor& x) const {
  return x + linear(name + ".out", at::silu(conv(name + ".conv", norm(name + ".norm", x))));
}

at::Tensor VqCodec::mixer(const std::string& name, const at::Tensor& x_BLC) const {
  const auto x =
      x_BLC + mix(name + ".position_out", at::silu(mix(name + ".position_in", norm(name + ".position_norm", x_BLC))));
  return x + linear(name + ".channel_out", at::silu(linear(name + ".channel_in", norm(name + ".channel_norm", x))));
}

at::Tensor VqCodec::embed(const at::Tensor& pixels_B3HW) const {
  auto x = space_to_depth(pixels_B3HW.permute({0, 2, 3, 1}) * 2 - 1, config_.patch);
  x = conv("encoder.in", x).to(at::kFloat);
  const int64_t levels = int64_t(config_.channels.size());
  for (int64_t level = 0; level < levels; ++level) {
    const std::string at = "encoder.level." + std::to_string(level);
    for (int64_t i = 0; i < config_.encoder_blocks[level]; ++i) x = residual(at + ".block." + std::to_string(i), x);
    if (level + 1 < levels) x = conv(at + ".down", x, 2).to(at::kFloat);
  }
  const auto z = linear("encoder.out", norm("encoder.norm", x)).to(at::kFloat).flatten(1, 2);
  // A fixed scale: the commitment weight and the restarts then mean the same for every configuration.
  return z * at::rsqrt(z.square().mean(-1, /*keepdim=*/true) + 1e-6);
}

at::Tensor VqCodec::nearest(const at::Tensor& z_BLZ) const {
  at::NoGradGuard no_grad;
  const auto z = z_BLZ.detach().reshape({-1, config_.code_width});
  // |z - c|^2 without |z|^2, which is the same for every code.
  const auto distance = at::addmm(codebook_NZ_.square().sum(1), z, codebook_NZ_.t(), 1, -2);
  return distance.argmin(1).view({z_BLZ.size(0), z_BLZ.size(1)});
}

at::Tensor VqCodec::render(const at::Tensor& z_BLZ) const {
  auto x = linear("decoder.in", z_BLZ) + parameter("decoder.position");
  for (int64_t i = 0; i < config_.mixer_blocks; ++i) x = mixer("decoder.mixer." + std::to_string(i), x);
  x = linear("decoder.grid", x)
          .to(at::kFloat)
          .view({x.size(0), config_.grid(), config_.grid(), config_.channels.back()});
  for (int64_t level = int64_t(config_.channels.size()) - 1; level >= 0; --level) {
    const std::string at = "decoder.level." + std::to_string(level);
    for (int64_t i = 0; i < config_.decoder_blocks[level]; ++i) x = residual(at + ".block." + std::to_string(i), x);
    if (level > 0) x = depth_to_space(linear(at + ".up", x), 2).to(at::kFloat);
  }
  x = conv("decoder.out", at::silu(norm("decoder.norm", x))).to(at::kFloat);
  return (depth_to_space(x, config_.patch) * 0.5 + 0.5).permute({0, 3, 1, 2});
}

at::Tensor VqCodec::encode(const at::Tensor& pixels_B3HW) const {
  check_pixels(pixels_B3HW);
  at::NoGradGuard no_grad;
  return nearest(embed(pixels_B3HW.to(codebook_NZ_.device())));
}

at::Tensor VqCodec::decode(const at::Tensor& ids_BL) const {
  check_ids(ids_BL);
  at::NoGradGuard no_grad;
  return render(codebook_NZ_.index({ids_BL.to(codebook_NZ_.device())})).clamp_(0, 1).contiguous();
}

void VqCodec::to(at::Device device) {
  for (auto& [name, tensor] : parameters_) tensor = tensor.detach().to(device);
  codebook_NZ_ = codebook_NZ_.to(device);
}

ParameterList VqCodec::encoder_parameters() const {
  ParameterList list;
  for (const auto& [name, tensor] : parameters_)
    if (name.rfind("encoder.", 0) == 0) list.emplace_back(name, tensor);
  return list;
}

ParameterList VqCodec::decoder_parameters() const {
  ParameterList list;
  for (const auto& [name, tensor] : parameters_)
    if (name.rfind("decoder.", 0) == 0) list.emplace_back(name, tensor);
  return list;
}

void VqCodec::set_codebook(const at::Tensor& codebook_NZ) {
  MOEGRAFT_INVARIANT(codebook_NZ.sizes() == codebook_NZ_.sizes(), "codebook shape");
  codebook_NZ_ = codebook_NZ.detach().clone();
}

std::unique_ptr<VqCodec> VqCodec::load(const std::filesystem::path& dir) {
  const auto path = dir / "config.json";
  const io::Json json = io::read_json(path);
  VqConfig c;
  auto integer = [&](const char* key, int64_t& value) {
    MOEGRAFT_CHECK(json.contains(key) && json[key].is_number_integer(), path.string(), ": \"", key,
                   "\" is missing or no integer");
    value = json[key].get<int64_t>();
    MOEGRAFT_CHECK(value >= 0 && value <= (1 << 20), path.string(), ": \"", key, "\" must be in [0, 1048576], got ",
                   value);
  };
  auto integers = [&](const char* key, std::vector<int64_t>& values) {
    MOEGRAFT_CHECK(json.contains(key) && json[key].is_array(), path.string(), ": \"", key, "\" is missing or no list");
    values.clear();
    for (const auto& v : json[key]) {
      MOEGRAFT_CHECK(v.is_number_integer(), path.string(), ": \"", key, "\" must hold integers");
      values.push_back(v.get<int64_t>());
    }
  };
  integer("image_size", c.image_size), integer("patch", c.patch), integer("mixer_blocks", c.mixer_blocks),
      integer("mixer_width", c.mixer_width);
  integer("codebook_size", c.codebook_size), integer("code_width", c.code_width);
  integers("channels", c.channels), integers("encoder_blocks", c.encoder_blocks),
      integers("decoder_blocks", c.decoder_blocks);
  MOEGRAFT_CHECK(c.image_size >= 1 && c.image_size <= 1024 && c.patch >= 1 && c.patch <= 64 && c.codebook_size >= 1 &&
                     c.code_width >= 1 && c.code_width <= 4096 && c.mixer_width >= 1 && c.mixer_width <= 8192 &&
                     c.mixer_blocks <= 64,
                 path.string(), ": a size is out of range");
  MOEGRAFT_CHECK(json.contains("fit") && (json["fit"] == "pad" || json["fit"] == "crop"), path.string(),
                 ": \"fit\" must be \"pad\" or \"crop\"");
  c.fit = json["fit"];
  return std::make_unique<VqCodec>(c, read_weights(dir), (dir / "model.safetensors").string());
}

void VqCodec::save(const std::filesystem::path& dir) const {
  std::filesystem::create_directories(dir);
  io::TensorMap tensors;
  for (const auto& [name, tensor] : parameters_) tensors[name] = tensor.detach();
  tensors["codebook"] = codebook_NZ_;
  const auto& c = config_;
  const io::Json json = {{"architecture", architecture()},
                         {"image_size", c.image_size},
                         {"patch", c.patch},
                         {"channels", c.channels},
                         {"encoder_blocks", c.encoder_blocks},
                         {"decoder_blocks", c.decoder_blocks},
                         {"mixer_blocks", c.mixer_blocks},
                         {"mixer_width", c.mixer_width},
                         {"codebook_size", c.codebook_size},
                         {"code_width", c.code_width},
                         {"fit", c.fit}};
  // New weights never stand beside another codec's config.json.
  const auto path = dir / "config.json";
  if (std::filesystem::exists(path) && io::read_json(path) != json) std::filesystem::remove(path);
  io::save_safetensors(dir / "model.safetensors", tensors, {{"format", "pt"}, {"architecture", architecture()}});
  io::write_json(path, json);
}

}  // namespace moegraft::codec
