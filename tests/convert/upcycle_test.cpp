// Dense models as mixtures: the function that is kept, by our own decoder; layouts that transformers reads are checked
// in tests/tools.
#include <gtest/gtest.h>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/convert/import_gguf.h"
#include "moegraft/convert/upcycle.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::convert {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/convert";

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

at::Tensor ffn(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down) {
  return (at::silu(x.mm(gate.t())) * x.mm(up.t())).mm(down.t());
}

struct Names {
  const char *dense, *moe, *gate, *up, *down;
};
const Names kNames[] = {{"llama", "block_sparse_moe", "w1", "w3", "w2"},
                        {"mistral", "block_sparse_moe", "w1", "w3", "w2"},
                        {"qwen3", "mlp", "gate_proj", "up_proj", "down_proj"}};

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

// Calibration inputs, the same of both layers.
std::function<std::vector<at::Tensor>()> both(const at::Tensor& layer) {
  return [layer] { return std::vector<at::Tensor>(2, layer); };
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
      {{.shards = 2, .clones = 3, .router = UpcycleRouter::kmeans}, 6, 2, 32, true},
      {{.method = UpcycleMethod::clone, .experts = 5, .top_k = 3, .router = UpcycleRouter::kmeans}, 5, 3, 64, true},
      {{.method = UpcycleMethod::split, .experts = 4, .top_k = 2, .router = UpcycleRouter::kmeans}, 4, 2, 16, false},
      {{.method = UpcycleMethod::cluster, .experts = 4, .top_k = 2}, 4, 2, 28, false},
      {{.method = UpcycleMethod::cluster, .experts = 5, .top_k = 2, .shared = 0},
       5,
       2,
       16,
       false},  // four neurons are over: shared
      {{.method = UpcycleMethod::cluster, .experts = 4, .top_k = 1, .router = UpcycleRouter::random}, 4, 1, 28, false},
  };
  for (const Names& n : kNames) {
    const auto before = io::load_safetensors(dense(n.dense) / "model.safetensors");
    const auto generator = at::make_generator<at::CPUGeneratorImpl>(17);
    const at::Tensor x = at::randn({20, 32}, generator, at::kDouble);
    for (size_t i = 0; i < std::size(cases); ++i) {
      Case c = cases[i];
      c.options.inputs = both(x.to(at::kFloat));
      SCOPED_TRACE(std::string(n.dense) + ", case " + std::to_string(i));
      const fs::path dir = root_ / (std::string(n.dense) + std::to_string(i));
      const auto report = upcycle(dense(n.dense), dir, c.options);
      EXPECT_EQ(report.experts, c.experts);
      EXPECT_EQ(report.top_k, c.top_k);
      EXPECT_EQ(report.expert_width, c.width);
      EXPECT_EQ(report.keeps_function, c.keeps);
      const auto after = io::load_safetensors(dir / "model.safetensors");
      for (const auto& [name, value] : before)
        if (name.find(".mlp.") == std::string::npos) { EXPECT_TRUE(after.at(name).equal(value)) << name; }
      for (int64_t l = 0; l < 2; ++l) {
        const std::string p = "model.layers." + std::to_string(l) + ".mlp.";
        const auto m = [&](const char* site) { return before.at(p + site + "_proj.weight").to(at::kDouble); };
        const at::Tensor expected = ffn(x, m("gate"), m("up"), m("down")), got = mixture(after, n, l, c.top_k, x);
        const double difference = (got - expected).abs().max().item<double>() / expected.abs().max().item<double>();
        if (c.keeps)
          EXPECT_LT(difference, 1e-6);  // float32 weights, times a whole number
        else
          EXPECT_GT(difference, 1e-3);
      }
      EXPECT_TRUE(fs::exists(dir / "tokenizer.json"));
    }
  }
}

// 64 neurons: 16 fire on every token, twelve groups of four with one direction each. x: tokens [T, D] of that kind.
struct Planted {
  fs::path dir;
  at::Tensor x;
};
Planted plant(const fs::path& dense, const fs::path& dir) {
  fs::copy(dense, dir);
  auto tensors = io::load_safetensors(dense / "model.safetensors");
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
  const auto uniform = [&](at::IntArrayRef shape) { return at::rand(shape, generator, at::kFloat); };
  const at::Tensor basis = at::eye(32, at::kFloat).narrow(0, 0, 13),
                   group = at::cat({at::zeros({16}, at::kLong), at::arange(48, at::kLong).remainder(12) + 1});
  for (int64_t l = 0; l < 2; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".mlp.";
    const at::Tensor order = at::randperm(64, generator, at::TensorOptions(at::kLong)),
                     directions = basis.index_select(0, group.index_select(0, order));
    tensors[p + "gate_proj.weight"] = directions * (2 + uniform({64, 1}));
    tensors[p + "up_proj.weight"] = directions * (2 + uniform({64, 1}));
    tensors[p + "down_proj.weight"] = uniform({32, 64}) - 0.5;
  }
  fs::remove(dir / "model.safetensors");
  io::save_safetensors(dir / "model.safetensors", tensors);
  return {dir, 3 * basis[0] + basis.narrow(0, 1, 12).repeat({20, 1}) * (1 + uniform({240, 1}))};
}

TEST_F(UpcycleTest, NeuronsThatFireTogetherAreOneExpertAndTheRouterKnowsWhen) {
  const Planted planted = plant(dense("llama"), root_ / "planted");
  const auto before = io::load_safetensors(planted.dir / "model.safetensors");
  const at::Tensor x = planted.x.to(at::kDouble);
  struct Case {
    int64_t top_k;
    double tolerance;  // of the mean: with several experts weights are 1 / top_k to a few percent
  };
  for (const Case& c : {Case{1, 1e-6}, Case{2, 0.05}, Case{12, 0.05}}) {
    const fs::path dir = root_ / ("clusters" + std::to_string(c.top_k));
    upcycle(planted.dir, dir,
            {.method = UpcycleMethod::cluster, .experts = 12, .top_k = c.top_k, .inputs = both(planted.x)});
    const auto after = io::load_safetensors(dir / "model.safetensors");
    for (int64_t l = 0; l < 2; ++l) {
      const std::string p = "model.layers." + std::to_string(l) + ".mlp.";
      const auto m = [&](const char* site) { return before.at(p + site + "_proj.weight").to(at::kDouble); };
      const at::Tensor expected = ffn(x, m("gate"), m("up"), m("down")), got = mixture(after, kNames[0], l, c.top_k, x);
      EXPECT_LT((got - expected).abs().mean().item<double>(), c.tolerance * expected.abs().mean().item<double>())
          << "top " << c.top_k;
    }
  }
}

TEST_F(UpcycleTest, AKmeansRouterSendsKindsOfInputsToExpertsOfTheirOwn) {
  const Planted planted = plant(dense("llama"), root_ / "planted");
  upcycle(planted.dir, root_ / "clones",
          {.method = UpcycleMethod::clone,
           .experts = 12,
           .top_k = 1,
           .router = UpcycleRouter::kmeans,
           .inputs = both(planted.x)});
  const auto after = io::load_safetensors(root_ / "clones/model.safetensors");
  for (const char* name :
       {"model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.gate.weight"}) {
    const at::Tensor chosen = planted.x.mm(after.at(name).t()).argmax(1).view({20, 12});
    EXPECT_TRUE(chosen.eq(chosen[0]).all().item<bool>());
    EXPECT_EQ(std::get<0>(at::_unique(chosen[0])).size(0), 12);
    // As a random router's: entries of 0.02 times the length of an input.
    EXPECT_NEAR(planted.x.mm(after.at(name).t()).std(0).mean().item<double>(),
                0.02 * planted.x.square().sum(1).mean().sqrt().item<double>(), 1e-5);
  }
}

TEST_F(UpcycleTest, SeedsDealDifferently) {
  UpcycleOptions a, b;
  b.seed = 1;
  upcycle(dense("llama"), root_ / "a", a), upcycle(dense("llama"), root_ / "again", a),
      upcycle(dense("llama"), root_ / "b", b);
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
      {"llama", {.clones = int64_t{1} << 62}, "make at most 4096 experts with --shards 4, got 4611686018427387904"},
      {"llama", {.method = UpcycleMethod::clone, .experts = 100000}, "--experts must be at most 4096, got 100000"},
      {"llama",
       {.method = UpcycleMethod::clone, .experts = 2, .top_k = 3},
       "--top-k must be in [1, --experts], got 3 of 2"},
      {"llama", {.method = UpcycleMethod::split, .experts = 3}, "--experts must divide"},
      {"llama", {.method = UpcycleMethod::clone, .redraw = 1.5}, "--redraw lie in [0, 1]"},
      {"llama", {.method = UpcycleMethod::cluster}, "give --text FILE"},
      {"llama", {.router = UpcycleRouter::kmeans}, "give --text FILE"},
      {"llama",
       {.method = UpcycleMethod::split, .router = UpcycleRouter::analytic},
       "--router analytic needs --method cluster"},
      {"llama", {.method = UpcycleMethod::cluster, .shared = 1}, "--shared must be in [0, 1), got 1"},
      {"llama",
       {.method = UpcycleMethod::cluster, .experts = 60},
       "--experts 60 leave no neuron for each of the FFN's 64"},
      {"llama",
       {.method = UpcycleMethod::cluster, .inputs = both(at::zeros({9, 31}))},
       "must be float32 [tokens, 32] with at least 8 tokens, got [9, 31]"},
      {"llama",
       {.method = UpcycleMethod::cluster, .inputs = both(at::zeros({7, 32}))},
       "with at least 8 tokens, got [7, 32]"},
      {"mixtral", {}, "mixtral is a mixture of experts already"},
      {"qwen3_moe", {}, "qwen3_moe is a mixture of experts already"},
      {"olmoe", {}, "model_type \"olmoe\" cannot be upcycled; known: llama, mistral, qwen3"},
  };
  for (const auto& c : cases)
    EXPECT_NE(error(c.base, c.options).find(c.message), std::string::npos)
        << c.message << " | " << error(c.base, c.options);
  dense("llama");
  fs::copy(root_ / "llama", root_ / "fewer");
  auto config = io::read_json(root_ / "fewer/config.json");
  config["vocab_size"] = config["vocab_size"].get<int64_t>() - 1;
  io::write_json(root_ / "fewer/config.json", config);
  EXPECT_NE(error("fewer", {}).find("vocab_size and hidden_size say ["), std::string::npos) << error("fewer", {});
  upcycle(dense("llama"), root_ / "upcycled", {});
  EXPECT_NE(error("upcycled", {}).find("mixtral is a mixture of experts already; upcycling starts from a dense model"),
            std::string::npos);
  EXPECT_THROW(parse_upcycle_method("magic"), UsageError);
  EXPECT_THROW(parse_upcycle_router("magic"), UsageError);
}

}  // namespace
}  // namespace moegraft::convert
