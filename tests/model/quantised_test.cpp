// A base that is quantised at load is the base whose files hold the format's values, to the bit, in every family and
// both compute dtypes.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/config.h"
#include "moegraft/model/decoder.h"
#include "moegraft/model/random_base.h"

namespace moegraft::model {
namespace {

namespace fs = std::filesystem;
const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/model";

at::Tensor values(const at::Tensor& w) { return kernels::quantise(w, kernels::WeightFormat::q8_0).dense(at::kFloat); }
// By the names in the files, so that a matrix that load_base forgets or takes too many shows. Routers, norms and biases
// stay.
at::Tensor stored_as(const std::string& name, const at::Tensor& t) {
  if (name.ends_with("gate.weight") || t.dim() < 2) return t.to(at::kFloat);
  if (t.dim() == 2) return values(t);
  std::vector<at::Tensor> experts;
  for (const at::Tensor& e : t.unbind(0)) experts.push_back(values(e));
  return at::stack(experts);
}

class Quantised : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    dir_ = fs::path(testing::TempDir()) / ("moegraft-quantised-" + std::to_string(::getpid()));
    fs::create_directories(dir_);
    for (const auto& file : fs::directory_iterator(kGolden / GetParam())) {
      const std::string name = file.path().filename().string();
      if (!name.starts_with("model") || !name.ends_with(".safetensors")) {
        fs::copy(file.path(), dir_ / name);
        continue;
      }
      io::TensorMap out;
      for (const auto& [tensor, t] : io::load_safetensors(file.path())) out[tensor] = stored_as(tensor, t).contiguous();
      io::save_safetensors(dir_ / name, out);
    }
  }
  void TearDown() override { fs::remove_all(dir_); }
  fs::path dir_;
};

LoadOptions q8_0(at::ScalarType dtype = at::kFloat) {
  LoadOptions options{dtype};
  options.quantise = kernels::WeightFormat::q8_0;
  return options;
}

TEST_P(Quantised, HasTheBitsOfItsValues) {
  const at::NoGradGuard no_grad;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Decoder got(load_base(kGolden / GetParam(), q8_0(dtype))), want(load_base(dir_, {dtype}));
    EXPECT_EQ(got.dtype(), dtype);
    const auto logits = [](const Decoder& d, const at::Tensor& ids) {
      return d.all_logits(d.forward(pack_rows(ids)).hidden_TD);
    };
    const at::Tensor ids = (at::arange(3 * 40).view({3, 40}) * 7 + 1) % got.spec().vocab_size;
    const at::Tensor a = logits(got, ids), b = logits(want, ids),
                     floats = logits(Decoder(load_base(kGolden / GetParam(), {dtype})), ids);
    EXPECT_TRUE(at::equal(a, b)) << dtype << ": off by " << (a - b).abs().max().item<double>();
    EXPECT_FALSE(at::equal(a, floats));
    // One token after another, from a cache.
    const auto decode = [&](const Decoder& d) {
      KvCache cache(d.spec(), 3, 10, dtype, at::kCPU);
      ForwardOptions options;
      options.cache = &cache;
      std::vector<at::Tensor> out;
      for (int64_t i = 0; i < 10; ++i) {
        PackedBatch batch = pack_rows(ids.narrow(1, i, 1));
        batch.positions_T.fill_(i);
        out.push_back(d.all_logits(d.forward(batch, options).hidden_TD));
      }
      return at::stack(out);
    };
    EXPECT_TRUE(at::equal(decode(got), decode(want))) << dtype;
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Quantised,
                         testing::Values("olmoe_clip_norm_tied", "qwen3_mixed", "qwen3_old_spelling", "mixtral",
                                         "llama_bias_tied", "mistral_window", "qwen3_dense", "qwen2_moe",
                                         "qwen2_moe_mixed", "dots1_groups"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Quantised, RandomWeightsToo) {
  const at::NoGradGuard no_grad;
  const DecoderSpec spec = read_spec(kGolden / "qwen3_mixed");
  const BaseModel floats = random_base(spec, at::kFloat, at::kCPU, 3),
                  q = random_base(spec, at::kFloat, at::kCPU, 3, kernels::WeightFormat::q8_0);
  EXPECT_TRUE(at::equal(q.weights->layer(0).attention.q.dense(at::kFloat),
                        values(floats.weights->layer(0).attention.q.tensor())));
  EXPECT_TRUE(at::equal(q.weights->head_VD().dense(at::kFloat), values(floats.weights->head_VD().tensor())));
}

TEST(Quantised, OneMatrixServesEmbeddingAndHeadOfATiedModel) {
  const BaseModel base = load_base(kGolden / "qwen2_moe_tied", q8_0());
  if (!kernels::quantised_products()) GTEST_SKIP() << "floats here";
  EXPECT_EQ(base.weights->embedding_VD().packed(), base.weights->head_VD().packed());
}

TEST(Quantised, SaysWhatItCannotDo) {
  const auto message = [](LoadOptions options, const fs::path& dir = kGolden / "qwen3") {
    options.quantise = kernels::WeightFormat::q8_0;
    try {
      load_base(dir, options);
    } catch (const UserError& e) { return std::string(e.what()); }
    return std::string("loaded");
  };
  EXPECT_EQ(message({at::kFloat, at::kCPU, Experts::absent}), "loaded");
  EXPECT_NE(message({at::kFloat, at::kCUDA}).find("model.quantize: q8_0 has no path on a GPU"), std::string::npos);
  EXPECT_NE(message({at::kFloat, at::kCPU, Experts::offloaded}).find("model.offload: none"), std::string::npos);
  for (const auto& row : kQuantizations) EXPECT_EQ(weight_format(row.value).has_value(), row.value != Quantize::none);

  const fs::path dir = fs::path(testing::TempDir()) / ("moegraft-quantised-nan-" + std::to_string(::getpid()));
  fs::remove_all(dir);
  save_base(random_base(read_spec(kGolden / "qwen3_mixed"), at::kFloat, at::kCPU), dir, at::kFloat);
  io::TensorMap tensors = io::load_safetensors(dir / "model.safetensors");
  for (auto& [name, t] : tensors) {
    t = t.clone();
    if (name == "model.layers.1.self_attn.k_proj.weight") t[2][5] = NAN;
  }
  io::save_safetensors(dir / "model.safetensors", tensors);
  EXPECT_NE(message({}, dir).find("layer 1, k: q8_0: row 2, columns 0 to"), std::string::npos) << message({}, dir);
  fs::remove_all(dir);
}

}  // namespace
}  // namespace moegraft::model
