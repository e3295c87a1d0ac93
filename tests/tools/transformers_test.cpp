// What we write, transformers loads: a base made from scratch gives the same logits there.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

TEST(Transformers, LoadsABaseTrainedFromScratch) {
  const std::string python = testing::reference_python(MOEGRAFT_SOURCE_DIR, "torch, transformers, safetensors");
  if (python.empty()) GTEST_SKIP() << "no Python with transformers (tools/setup.sh --tests installs one)";
  at::NoGradGuard no_grad;
  testing::TemporaryFolder folder;
  std::vector<std::string> command{python, std::string(MOEGRAFT_SOURCE_DIR) + "/tests/model/check_transformers.py"};
  for (const std::string family : {"olmoe", "qwen3_moe", "mixtral"})
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
      s.norm_topk_prob = true;
      s.max_positions = 64;
      s.tie_word_embeddings = tied;
      s.layers.assign(2, {});
      if (family == "qwen3_moe") s.layers[1].sparse = false;
      s.qk_norm = family == "olmoe" ? model::QkNorm::full : family == "qwen3_moe" ? model::QkNorm::per_head : model::QkNorm::none;
      s.initializer_range = 0.2;
      model::BaseModel base = model::init_base(s, {1.0, 5});
      const auto dir = folder / (family + (tied ? "-tied" : ""));
      model::save_base(base, dir, at::kFloat, tied ? 6000 : int64_t{1} << 30);  // sharded as well
      const model::Decoder decoder(std::move(base));
      const at::Tensor ids = at::arange(3, 33).view({2, 15});
      io::save_safetensors(dir / "golden.safetensors", {{"input_ids", ids}, {"logits", decoder.all_logits(decoder.forward(model::pack_rows(ids)).hidden_TD).view({2, 15, -1})}});
      command.push_back(dir.string());
    }
  const auto result = testing::Process(command, {"HF_HUB_OFFLINE=1"}).wait();
  EXPECT_EQ(result.code, 0) << result.out << result.err;
}

}  // namespace
}  // namespace moegraft
