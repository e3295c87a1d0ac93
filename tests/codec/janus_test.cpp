#include <gtest/gtest.h>
#include "../support/paths.h"
#include "libtorch.h"

#include <filesystem>

#include "moegraft/base/check.h"
#include "moegraft/codec/codec.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::codec {
namespace {

namespace fs = std::filesystem;

uint32_t crc32(const std::string& text) {
  uint32_t crc = 0xFFFFFFFFu;
  for (const unsigned char c : text) {
    crc ^= c;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

// The same numbers as `weight` in tests/golden/make_codec.py.
at::Tensor weight(const std::string& name, const std::vector<int64_t>& shape) {
  auto out = at::empty(shape);
  const int64_t count = out.numel();
  const bool norm = name.find("norm") != std::string::npos && name.ends_with("weight");
  const double scale = shape.size() > 1 ? std::sqrt(3.0 / double(count / shape[0])) : 0.125,
               shift = shape.size() > 1 || !norm ? 0 : 1;
  for (int64_t i = 0; i < count; ++i) {
    auto x = uint32_t(uint64_t(i) * 2654435761u + crc32(name));
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13, x *= 3266489917u, x ^= x >> 16;
    const double u = double(x) / 2147483648.0 - 1;
    out.data_ptr<float>()[i] = float(scale * u + shift);
  }
  return out;
}

struct Case {
  fs::path dir;
  io::TensorMap weights, expected;
  std::string prefix;
  ~Case() { fs::remove_all(dir); }
};

// Writes the folder a user would have.
std::unique_ptr<Case> make_case(const std::string& name) {
  auto c = std::make_unique<Case>();
  const fs::path golden = fs::path(test_source_dir()) / "tests/golden/codec";
  c->dir = fs::path(testing::TempDir()) / ("janus_" + name);
  fs::remove_all(c->dir);
  fs::create_directories(c->dir);
  const auto json = io::read_json(golden / (name + ".json"));
  c->expected = io::load_safetensors(golden / (name + ".safetensors"));
  c->prefix = json["prefix"];
  for (const auto& [key, shape] : json["shapes"].items())
    c->weights[key] = weight(key.substr(c->prefix.size()), shape.get<std::vector<int64_t>>());
  c->weights[c->prefix + "quantize.embedding.weight"] = c->expected.at("codebook");
  io::write_json(c->dir / "config.json", json["config"]);
  io::save_safetensors(c->dir / "model.safetensors", c->weights, {{"format", "pt"}});
  return c;
}

class JanusParity : public ::testing::TestWithParam<const char*> {};

TEST_P(JanusParity, IdsAndPixelsEqualTransformers) {
  const auto c = make_case(GetParam());
  const auto codec = load_codec(c->dir);
  EXPECT_EQ(codec->architecture(), "janus_vqgan");
  EXPECT_EQ(codec->image_size(), c->expected.at("pixels").size(2));
  EXPECT_TRUE(at::equal(codec->encode(c->expected.at("pixels")), c->expected.at("ids")));
  const auto pixels = codec->decode(c->expected.at("ids"));
  // transformers returns about [-1, 1], unclamped.
  EXPECT_LE((pixels - (c->expected.at("decoded") * 0.5 + 0.5).clamp(0, 1)).abs().max().item<double>(), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Golden, JanusParity, ::testing::Values("single_level", "two_levels", "three_levels"));

TEST(Janus, BrokenWeightsAreNamed) {
  const auto c = make_case("two_levels");
  auto says = [&](const io::TensorMap& tensors) -> std::string {
    io::save_safetensors(c->dir / "model.safetensors", tensors);
    try {
      load_codec(c->dir);
    } catch (const UserError& e) { return e.what(); }
    return "nothing thrown";
  };
  auto fewer = c->weights;
  fewer.erase(c->prefix + "decoder.mid.attn_1.k.weight");
  EXPECT_NE(says(fewer).find("model.vqmodel.decoder.mid.attn_1.k.weight is missing"), std::string::npos) << says(fewer);
  auto wrong = c->weights;
  wrong[c->prefix + "quant_conv.bias"] = at::zeros({3});
  EXPECT_NE(says(wrong).find("model.vqmodel.quant_conv.bias must have shape [8] by the config, got [3]"),
            std::string::npos)
      << says(wrong);
  EXPECT_NE(says({{"something", at::zeros({1})}}).find("expected the weights of transformers' JanusVQVAE"),
            std::string::npos);
  EXPECT_EQ(says(c->weights), "nothing thrown");

  auto config = io::read_json(c->dir / "config.json");
  config["vq_config"]["base_channels"] = 30;
  io::write_json(c->dir / "config.json", config);
  EXPECT_NE(says(c->weights).find("multiple of 32"), std::string::npos) << says(c->weights);
}

}  // namespace
}  // namespace moegraft::codec
