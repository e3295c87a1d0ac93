// A checkpoint means what transformers makes of it: every row of checkpoint_variants.py gives transformers' logits and
// ids, or one line that says why not.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"
#include "moegraft/model/stop_ids.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;

// What happened, in the words of the table's third column; the largest difference of the logits in `difference`.
std::string load(const fs::path& dir, double& difference) {
  ::testing::internal::CaptureStderr();
  std::string error;
  try {
    const at::NoGradGuard no_grad;
    const model::Decoder decoder(model::load_base(dir));
    if (fs::exists(dir / "golden.safetensors")) {
      const auto golden = io::load_safetensors(dir / "golden.safetensors");
      const at::Tensor logits = decoder.all_logits(decoder.forward(model::pack_rows(golden.at("input_ids"))).hidden_TD)
                                    .view(golden.at("logits").sizes());
      difference = (logits - golden.at("logits")).abs().max().item<double>() /
                   std::max(1.0, golden.at("logits").abs().max().item<double>());
    }
  } catch (const UserError& e) { error = e.what(); }
  const std::string lines = ::testing::internal::GetCapturedStderr();
  return error.empty() ? lines.empty() ? "" : "warning: " + lines : "error: " + error;
}

TEST(CheckpointVariants, MeanWhatTransformersMakesOfThem) {
  const std::string python = testing::reference_python(test_source_dir(), "torch, transformers, safetensors");
  if (python.empty()) GTEST_SKIP() << "no Python with transformers (tools/setup.sh --tests installs one)";
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder / "world");
  const fs::path out = folder / "variants";
  fs::create_directories(out);
  const auto made = testing::Process({python, test_source_dir() + "/tests/model/checkpoint_variants.py", out.string(),
                                      world.tokenizer.string()},
                                     {"HF_HUB_OFFLINE=1"})
                        .wait();
  ASSERT_EQ(made.code, 0) << made.out << made.err;
  const io::Json cases = io::read_json(out / "cases.json");
  for (const io::Json& c : cases.at("logits")) {
    const fs::path dir = c.at("dir").get<std::string>();
    const std::string expected = c.at("expected");
    EXPECT_FALSE(c.contains("refused")) << dir.filename() << ": " << c.value("refused", "");
    double difference = 0;
    const std::string got = load(dir, difference);
    const size_t colon = expected.find(": ");
    if (expected.empty())
      EXPECT_EQ(got, "") << dir.filename();
    else
      EXPECT_TRUE(got.starts_with(expected.substr(0, colon + 2)) &&
                  got.find(expected.substr(colon + 2)) != std::string::npos)
          << dir.filename() << ": expected " << expected << ", got " << got;
    EXPECT_LE(difference, 1e-4) << dir.filename();
  }
  for (const io::Json& c : cases.at("defaults")) {
    const model::DecoderSpec s = model::read_spec(c.at("dir").get<std::string>());
    const auto id = [](int64_t value) { return value < 0 ? io::Json(nullptr) : io::Json(value); };
    const io::Json fields{{"vocab_size", s.vocab_size},
                          {"hidden_size", s.hidden_size},
                          {"intermediate_size", s.intermediate_size},
                          {"num_hidden_layers", s.num_layers},
                          {"num_attention_heads", s.num_heads},
                          {"num_key_value_heads", s.num_kv_heads},
                          {"num_experts", s.num_experts},
                          {"num_experts_per_tok", s.num_experts_per_tok},
                          {"max_position_embeddings", s.max_positions},
                          {"rms_norm_eps", s.rms_norm_eps},
                          {"initializer_range", s.initializer_range},
                          {"router_aux_loss_coef", s.router_aux_loss_coef},
                          {"tie_word_embeddings", s.tie_word_embeddings},
                          {"bos_token_id", id(s.bos_id)},
                          {"eos_token_id", id(s.eos_id)},
                          {"pad_token_id", id(s.pad_id)}};
    EXPECT_EQ(fields, c.at("fields")) << s.family;
    EXPECT_EQ(s.moe_intermediate_size, c.at("moe_width").get<int64_t>()) << s.family;
    EXPECT_EQ(s.rope.theta, c.at("rope_theta").get<double>()) << s.family;
    EXPECT_EQ(s.router.renormalise, c.at("norm_topk_prob").get<bool>()) << s.family;
    EXPECT_EQ(s.layers.at(0).sliding_window, c.at("sliding_window").get<int64_t>()) << s.family;
  }
  for (const io::Json& c : cases.at("tokens")) {
    const fs::path dir = c.at("dir").get<std::string>();
    const auto tokenizer = tokenizer::load_tokenizer(dir);
    EXPECT_EQ(tokenizer->size(), c.at("size").get<int64_t>()) << dir.filename();
    for (size_t i = 0; i < c.at("texts").size(); ++i) {
      const auto ids = c.at("ids")[i].get<std::vector<int64_t>>();
      EXPECT_EQ(tokenizer->encode(c.at("texts")[i].get<std::string>()), ids)
          << dir.filename() << ": " << c.at("texts")[i];
      EXPECT_EQ(tokenizer->decode(ids), c.at("decoded")[i].get<std::string>())
          << dir.filename() << ": " << c.at("texts")[i];
    }
  }
}

TEST(CheckpointVariants, EveryEosIdOfBothFilesEndsText) {
  struct Case {
    const char *config, *generation;
    std::vector<int64_t> ids;
  };
  const std::vector<Case> cases{{R"({"eos_token_id": 2})", nullptr, {2}},
                                {R"({"eos_token_id": [2, 23]})", nullptr, {2, 23}},
                                {R"({"eos_token_id": 2})", R"({"eos_token_id": [23, 2]})", {2, 23}},
                                {R"({"eos_token_id": null})", R"({"eos_token_id": 5})", {5}},
                                {R"({})", R"({})", {}}};
  for (const Case& c : cases) {
    testing::TemporaryFolder folder;
    io::write_json(folder / "config.json", io::Json::parse(c.config));
    if (c.generation) io::write_json(folder / "generation_config.json", io::Json::parse(c.generation));
    EXPECT_EQ(model::read_eos_ids(folder.path()), c.ids) << c.config;
  }
  testing::TemporaryFolder folder;
  io::write_json(folder / "config.json", {{"eos_token_id", "x"}});
  EXPECT_THROW(model::read_eos_ids(folder.path()), UserError);
}

}  // namespace
}  // namespace moegraft
