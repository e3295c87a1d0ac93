// Dense models as mixtures: the function that is kept, by our own decoder; layouts that transformers reads are checked in tests/tools.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/convert/import_gguf.h"
#include "moegraft/convert/upcycle.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::convert {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(MOEGRAFT_SOURCE_DIR) / "tests/golden/convert";

class UpcycleTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "moegraft_upcycle_XXXXXX").string();
    root_ = ::mkdtemp(name.data());
  }
  void TearDown() override { fs::remove_all(root_); }
  fs::path dense(const std::string& name) {
    const fs::path dir = root_ / name;
    if (!fs::exists(dir)) import_gguf(kGolden / (name + ".gguf"), dir, {.dtype = at::kFloat});
    return dir;
  }
  std::string error(const std::string& name, const UpcycleOptions& options) {
    try {
      upcycle(dense(name), root_ / "refused", options);
    } catch (const UserError& e) {
      EXPECT_FALSE(fs::exists(root_ / "refused"));
      return e.what();
    }
    return "no error";
  }
  fs::path root_;
};

at::Tensor ffn(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down) { return (at::silu(x.mm(gate.t())) * x.mm(up.t())).mm(down.t()); }

struct Names {
  const char *dense, *moe, *gate, *up, *down;
};
const Names kNames[] = {{"llama", "block_sparse_moe", "w1", "w3", "w2"}, {"mistral", "block_sparse_moe", "w1", "w3", "w2"}, {"qwen3", "mlp", "gate_proj", "up_proj", "down_proj"}};

// The mixture's layer by its definition: softmax over the router, the top K renormalised.
at::Tensor mixture(const io::TensorMap& t, const Names& n, int64_t layer, int64_t K, const at::Tensor& x) {
  const std::string p = "model.layers." + std::to_string(layer) + "." + n.moe + ".";
  const auto [weights, ids] = at::softmax(x.mm(t.at(p + "gate.weight").t().to(at::kDouble)), 1).topk(K, 1);
  const at::Tensor normed = weights / weights.sum(1, true);
  at::Tensor out = at::zeros_like(x);
  for (int64_t row = 0; row < x.size(0); ++row)
    for (int64_t k = 0; k < K; ++k) {
      const std::string e = p + "experts." + std::to_string(ids[row][k].item<int64_t>()) + ".";
      const auto m = [&](const char* site) { return t.at(e + site + ".weight").to(at::kDouble); };
      out[row] += normed[row][k] * ffn(x.narrow(0, row, 1), m(n.gate), m(n.up), m(n.down))[0];
    }
  return out;
}

TEST_F(UpcycleTest, EveryMethodIsItsDefinition) {
  struct Case {
    UpcycleOptions options;
    int64_t experts, top_k, width;
    bool keeps;
  };
  const Case cases[] = {
      {{.shards = 4, .clones = 4}, 16, 4, 16, true},
      {{.shards = 8, .clones = 1}, 8, 8, 8, true},
      {{.shards = 1, .clones = 3}, 3, 1, 64, true},
      {{.shards = 2, .clones = 3, .contiguous = true}, 6, 2, 32, true},
      {{.method = UpcycleMethod::clone, .experts = 5, .top_k = 3}, 5, 3, 64, true},
      {{.method = UpcycleMethod::clone, .experts = 4, .top_k = 2, .noise = 0.1}, 4, 2, 64, false},
      {{.method = UpcycleMethod::clone, .experts = 4, .top_k = 2, .redraw = 0.5}, 4, 2, 64, false},
      {{.method = UpcycleMethod::split, .experts = 4, .top_k = 2}, 4, 2, 16, false},
      {{.method = UpcycleMethod::split, .experts = 4, .top_k = 4}, 4, 4, 16, false},
  };
  for (const Names& n : kNames) {
    const auto before = io::load_safetensors(dense(n.dense) / "model.safetensors");
    const auto generator = at::make_generator<at::CPUGeneratorImpl>(17);
    const at::Tensor x = at::randn({20, 32}, generator, at::kDouble);
    for (size_t i = 0; i < std::size(cases); ++i) {
      const Case& c = cases[i];
      SCOPED_TRACE(std::string(n.dense) + ", case " + std::to_string(i));
      const fs::path dir = root_ / (std::string(n.dense) + std::to_string(i));
      const auto report = upcycle(dense(n.dense), dir, c.options);
      EXPECT_EQ(report.experts, c.experts);
      EXPECT_EQ(report.top_k, c.top_k);
      EXPECT_EQ(report.expert_width, c.width);
      EXPECT_EQ(report.keeps_function, c.keeps);
      const auto after = io::load_safetensors(dir / "model.safetensors");
      for (const auto& [name, value] : before)
        if (name.find(".mlp.") == std::string::npos) EXPECT_TRUE(after.at(name).equal(value)) << name;
      for (int64_t l = 0; l < 2; ++l) {
        const std::string p = "model.layers." + std::to_string(l) + ".mlp.";
        const auto m = [&](const char* site) { return before.at(p + site + "_proj.weight").to(at::kDouble); };
        const at::Tensor expected = ffn(x, m("gate"), m("up"), m("down")), got = mixture(after, n, l, c.top_k, x);
        const double difference = (got - expected).abs().max().item<double>() / expected.abs().max().item<double>();
        if (c.keeps) EXPECT_LT(difference, 1e-6);  // float32 weights, times a whole number
        else EXPECT_GT(difference, 1e-3);
      }
      EXPECT_TRUE(fs::exists(dir / "tokenizer.json"));
    }
  }
}

TEST_F(UpcycleTest, SeedsDealDifferently) {
  UpcycleOptions a, b;
  b.seed = 1;
  upcycle(dense("llama"), root_ / "a", a), upcycle(dense("llama"), root_ / "again", a), upcycle(dense("llama"), root_ / "b", b);
  const std::string name = "model.layers.1.block_sparse_moe.experts.0.w1.weight";
  const auto of = [&](const char* dir) { return io::load_safetensors(root_ / dir / "model.safetensors").at(name); };
  EXPECT_TRUE(of("a").equal(of("again")));
  EXPECT_FALSE(of("a").equal(of("b")));
}

TEST_F(UpcycleTest, ImpossibleOnesAreRefused) {
  struct Case {
    const char* base;
    UpcycleOptions options;
    const char* message;
  };
  const Case cases[] = {
      {"llama", {.shards = 5}, "--shards must divide the FFN's 64 neurons, got 5"},
      {"llama", {.shards = 0}, "--shards must divide"},
      {"llama", {.clones = 0}, "--clones must be at least 1"},
      {"llama", {.method = UpcycleMethod::clone, .experts = 2, .top_k = 3}, "--top-k must be in [1, --experts], got 3 of 2"},
      {"llama", {.method = UpcycleMethod::split, .experts = 3}, "--experts must divide"},
      {"llama", {.method = UpcycleMethod::clone, .redraw = 1.5}, "--redraw lie in [0, 1]"},
      {"mixtral", {}, "mixtral is a mixture of experts already"},
      {"qwen3_moe", {}, "qwen3_moe is a mixture of experts already"},
      {"olmoe", {}, "model_type \"olmoe\" cannot be upcycled; known: llama, mistral, qwen3"},
  };
  for (const auto& c : cases) EXPECT_NE(error(c.base, c.options).find(c.message), std::string::npos) << c.message << " | " << error(c.base, c.options);
  upcycle(dense("llama"), root_ / "upcycled", {});
  EXPECT_NE(error("upcycled", {}).find("mixtral is a mixture of experts already; upcycling starts from a dense model"), std::string::npos);
  EXPECT_THROW(parse_upcycle_method("magic"), UsageError);
}

}  // namespace
}  // namespace moegraft::convert
