// What we write, transformers loads: bases made from scratch, and dense models as mixtures of experts, give the same
// logits there.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/convert/import_gguf.h"
#include "moegraft/convert/upcycle.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;

// Our logits of `base`, beside the model in `dir` that is to give them.
void write_golden(const fs::path& dir, model::BaseModel base) {
  const model::Decoder decoder(std::move(base));
  const at::Tensor ids = at::arange(3, 33).view({2, 15});
  io::save_safetensors(
      dir / "golden.safetensors",
      {{"input_ids", ids},
       {"logits", decoder.all_logits(decoder.forward(model::pack_rows(ids)).hidden_TD).view({2, 15, -1})}});
}

std::vector<std::string> bases_from_scratch(const fs::path& folder) {
  std::vector<std::string> dirs;
  for (const std::string family : model::known_families())
    for (const bool tied : {false, true}) {
      model::DecoderSpec s;
      s.family = family;
      s.vocab_size = 61;
      s.hidden_size = 24;
      s.num_layers = 2;
      s.num_heads = 4;
      s.num_kv_heads = 2;
      s.head_dim = family == "olmoe" ? 6 : 8;
      s.num_experts = 5;
      s.num_experts_per_tok = 2;
      s.intermediate_size = s.moe_intermediate_size = 10;
      s.router.renormalise = true;
      s.max_positions = 64;
      s.tie_word_embeddings = tied;
      s.layers.assign(2, {});
      if (family == "qwen3_moe") s.layers[1].sparse = false;
      s.initializer_range = 0.2;
      model::BaseModel base = model::init_base(model::complete_spec(s), {1.0, 5});
      const auto dir = folder / (family + (tied ? "-tied" : ""));
      model::save_base(base, dir, at::kFloat, tied ? 6000 : int64_t{1} << 30);  // sharded as well
      write_golden(dir, std::move(base));
      dirs.push_back(dir.string());
    }
  return dirs;
}

// The dense model itself must give what its mixture of one expert gives here.
std::vector<std::string> upcycled_models(const fs::path& folder) {
  using convert::UpcycleMethod;
  const at::Tensor x = at::randn({40, 32}, at::make_generator<at::CPUGeneratorImpl>(17), at::kFloat);
  const convert::UpcycleOptions options[] = {
      {.shards = 1, .clones = 1},
      {.shards = 4, .clones = 4},
      {.method = UpcycleMethod::clone, .experts = 5, .top_k = 3},
      {.method = UpcycleMethod::split, .experts = 4, .top_k = 2},
      {.method = UpcycleMethod::cluster,
       .experts = 4,
       .top_k = 2,
       .inputs = [x] { return std::vector<at::Tensor>{x, x}; }},
  };
  std::vector<std::string> dirs;
  for (const std::string name : {"llama", "mistral", "qwen3"}) {
    const fs::path dense = folder / ("dense-" + name);
    convert::import_gguf(fs::path(test_source_dir()) / "tests/golden/convert" / (name + ".gguf"), dense,
                         {.dtype = at::kFloat});
    for (size_t i = 0; i < std::size(options); ++i) {
      const fs::path dir = folder / (name + std::to_string(i));
      convert::upcycle(dense, dir, options[i]);
      write_golden(dir, model::load_base(dir));
      dirs.push_back(dir.string());
    }
    fs::copy(folder / (name + "0") / "golden.safetensors", dense / "golden.safetensors");
    dirs.push_back(dense.string());
  }
  return dirs;
}

TEST(Transformers, LoadsWhatWeWrite) {
  const std::string python = testing::reference_python(test_source_dir(), "torch, transformers, safetensors");
  if (python.empty()) GTEST_SKIP() << "no Python with transformers (tools/setup.sh --tests installs one)";
  at::NoGradGuard no_grad;
  testing::TemporaryFolder folder;
  std::vector<std::string> command{python, test_source_dir() + "/tests/model/check_transformers.py"};
  for (const auto& dirs : {bases_from_scratch(folder.path()), upcycled_models(folder.path())})
    command.insert(command.end(), dirs.begin(), dirs.end());
  const auto result = testing::Process(command, {"HF_HUB_OFFLINE=1"}).wait();
  EXPECT_EQ(result.code, 0) << result.out << result.err;
}

}  // namespace
}  // namespace moegraft
