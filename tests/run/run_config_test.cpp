#include "moegraft/run/run_config.h"

#include <gtest/gtest.h>

namespace moegraft::run {
namespace {

constexpr const char* kGraft = R"(
run: { dir: runs/a }
model: { path: models/base }
modalities: { image: { codec: models/codec } }
adapters: [ { rank: 4 } ]
data: { train: [ { path: d.safetensors } ] }
)";

RunConfig parse(const std::vector<std::string>& overrides = {}, const std::string& yaml = kGraft) {
  return config::parse<RunConfig>(config::Document::from_string(yaml, overrides));
}

std::string error_of(const std::vector<std::string>& overrides, const std::string& yaml = kGraft) {
  try {
    parse(overrides, yaml);
  } catch (const UsageError& e) { return e.what(); }
  return {};
}

TEST(RunConfig, AcceptsASmallGraftAndRoundTrips) {
  const auto config = parse();
  EXPECT_EQ(config.adapters[0].rank, 4);
  const auto text = config::dump(config);
  EXPECT_EQ(config::dump(config::parse<RunConfig>(config::Document::from_string(text))), text);
}

TEST(RunConfig, AcceptsTrainingFromScratch) {
  EXPECT_EQ(error_of({}, R"(
run: { dir: runs/base }
model: { init: { tokenizer: t } }
train: { base_weights: full }
data: { train: [ { path: d } ] }
)"),
            "");
}

TEST(RunConfig, CrossFieldRulesNameTheKey) {
  struct Case {
    std::vector<std::string> overrides;
    const char* expected;
  };
  const Case cases[] = {
      {{"run.dir=\"\""}, "run.dir must not be empty"},
      {{"model.path=\"\""}, "got neither"},
      {{"model.init.tokenizer=t"}, "got both"},
      {{"model.path=\"\"", "model.init.tokenizer=t"}, "train.base_weights: full"},
      {{"model.path=\"\"", "model.init.tokenizer=t", "train.base_weights=full", "model.init.num_kv_heads=4"},
       "num_heads must be a multiple"},
      {{"model.path=\"\"", "model.init.tokenizer=t", "train.base_weights=full", "model.init.num_experts_per_tok=9"},
       "num_experts_per_tok"},
      {{"model.path=\"\"", "model.init.tokenizer=t", "train.base_weights=full", "model.init.head_dim=3"},
       "head_dim must be even"},
      {{"model.path=\"\"", "model.init.tokenizer=t", "train.base_weights=full", "model.init.max_positions=8"},
       "max_positions"},
      {{"modalities.image.codec=\"\""}, "modalities.image.codec must not be empty"},
      {{"modalities.image.end=<image>"}, "must differ"},
      {{"modalities.image.begin=\"\""}, "modalities.image.begin must not be empty"},
      {{"modalities.text.codec=c"}, "text is the base's own"},
      {{"adapters[0].modality=[imagee]"}, "did you mean image?"},
      {{"adapters[0].modality=[]"}, "adapters[0].modality"},
      {{"adapters[0].modality=[image, image]"}, "twice"},
      {{"adapters[0].modality=[text]"}, "allow_text_drift"},
      {{"adapters[0].sites=[gate, routr]"}, "got routr"},
      {{"adapters[0].sites=[q, q]"}, "twice"},
      {{"adapters[0].sites=[]"}, "adapters[0].sites"},
      {{"adapters[0].layers=[1, 1]"}, "adapters[0].layers"},
      {{"adapters[0].layers=[-1]"}, "adapters[0].layers"},
      {{"adapters[0].alpha=0"}, "adapters[0].alpha"},
      {{"adapters[0].d_initial=1"}, "d_initial"},
      {{"adapters[0].kind=vera", "adapters[0].alpha=8"}, "alpha"},
      {{"adapters[0].kind=veera"},
       "adapters[0].kind must be one of modality_lora, vera, got veera; did you mean vera?"},
      {{"adapters[0].init=pissa"},
       "adapters[0].init must be one of kaiming_zero, gw_subspace, activation_svd, got pissa"},
      {{"embeddings.init=gw_magic"},
       "embeddings.init must be one of random, sampled_rows, moment_match, gw_barycentric, gw_procrustes, gw_cluster, "
       "got gw_magic"},
      {{"ot.epsilon=[]"}, "ot.epsilon"},
      {{"ot.epsilon=[0.1, 0]"}, "ot.epsilon[1]"},
      {{"ot.epsilon=[0.1, 0.2]"}, "must decrease"},
      {{"ot.epsilon=[0.1, 0.1]"}, "must decrease"},
      {{"data.train=[]"}, "data.train"},
      {{"data.train[0].path=\"\""}, "data.train[0].path must not be empty"},
      {{"data.train[0].weight=0"}, "at least one weight"},
      {{"data.tokens_per_step=256"}, "data.sequence_length"},
      {{"parallel.expert=0"}, "parallel.expert"},
      {{"parallel.expert=2", "train.base_weights=full", "train.allow_text_drift=true"}, "needs a frozen base"},
      {{"parallel.shard_base=true", "train.base_weights=full", "train.allow_text_drift=true"}, "needs a frozen base"},
      {{"parallel.shard_base=true", "model.offload=experts"}, "two places"},
      {{"train.precision=bf16"},
       "train.precision has moved to model.dtype: write model.dtype: bfloat16 instead (set by --set)"},
      {{"train.precision=float32", "model.dtype=bfloat16"}, "write model.dtype: bfloat16 instead"},
      {{"train.betas=[0.9]"}, "two values"},
      {{"train.betas=[0.9, 1.0]"}, "[0, 1)"},
      {{"train.adam_epsilon=0"}, "train.adam_epsilon"},
      {{"train.base_weights=full"}, "allow_text_drift"},
      {{"adapters=[]", "modalities={}"}, "nothing trains"},
      {{"train.eval_every=5"}, "data.eval"},
      {{"train.sample_every=5"}, "train.sample_prompts"},
  };
  for (const auto& test : cases) {
    const auto message = error_of(test.overrides);
    EXPECT_NE(message.find(test.expected), std::string::npos)
        << test.overrides[0] << ": expected \"" << test.expected << "\", got \"" << message << "\"";
    EXPECT_EQ(message.find('\n'), std::string::npos) << "one line";
  }
  EXPECT_EQ(error_of({"adapters[0].modality=[text]", "train.allow_text_drift=true"}), "");
  EXPECT_EQ(error_of({"train.base_weights=full", "train.allow_text_drift=true"}), "");
}

}  // namespace
}  // namespace moegraft::run
