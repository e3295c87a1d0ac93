#pragma once
// Shards whose documents say who they are, and what tests of the streams ask about batches.

#include <gtest/gtest.h>

#include "moegraft/data/stream.h"
#include "tests_data.h"

namespace moegraft::data::test {

using Longs = std::vector<int64_t>;

inline const Schema kSchema{{{"text", 1000, 0}, {"image", 5, 4}}};
inline constexpr int64_t kFirst = 1024;  // new ids start at the model's vocabulary, beyond the tokenizer's

inline model::Vocabulary vocabulary() {
  model::Vocabulary v;
  v.text_size = kFirst, v.bos_id = 1, v.eos_id = 2;
  v.modalities = {{"image", 1, kFirst, 5, 4}};
  return v;
}

// Documents that say who they are: text document i is i times (20 + source * 400 + i).
struct StreamData : ::testing::Test {
  Folder folder;
  DataConfig config;
  void SetUp() override {
    config.sequence_length = 24;
    config.tokens_per_step = 60;
    std::vector<Lists> text, pictures;
    for (int32_t i = 0; i < 30; ++i) text.push_back({{0, std::vector<int32_t>(1 + i % 7, 20 + i)}});
    for (int32_t i = 0; i < 13; ++i)
      pictures.push_back({{0, std::vector<int32_t>(1 + i % 3, 420 + i)}, {1, {0, 1, i % 5, i % 2}}});
    test::write_shards(folder / "text", kSchema, text, 40);
    test::write_shards(folder / "pictures", kSchema, pictures);
    config.train = {{(folder / "text").string(), 2.0}, {(folder / "pictures").string(), 1.0}};
  }
  BatchStream stream(uint64_t seed = 17, const Share& share = {}) {
    return {config.train, config, vocabulary(), seed, share};
  }
  // Of one process with one micro-batch.
  static model::PackedBatch whole(StepBatch step) {
    EXPECT_EQ(step.micro_batches.size(), 1u);
    EXPECT_EQ(step.num_tokens, step.micro_batches[0].num_tokens());
    EXPECT_EQ(step.num_labels, step.micro_batches[0].facts->num_labels);
    EXPECT_EQ(step.rank_tokens, Longs{step.num_tokens});
    return step.micro_batches[0];
  }
  static std::vector<Longs> sequences(const model::PackedBatch& batch) {
    std::vector<Longs> out;
    const auto ids = values(batch.ids_T);
    for (int64_t s = 0; s < batch.num_sequences(); ++s)
      out.emplace_back(ids.begin() + batch.cu_seqlens[s], ids.begin() + batch.cu_seqlens[s + 1]);
    return out;
  }
  static void expect_equal(const model::PackedBatch& a, const model::PackedBatch& b) {
    EXPECT_EQ(a.cu_seqlens, b.cu_seqlens);
    for (auto field : {&model::PackedBatch::ids_T, &model::PackedBatch::modality_T, &model::PackedBatch::positions_T,
                       &model::PackedBatch::labels_T})
      EXPECT_EQ(values(a.*field), values(b.*field));
    ASSERT_TRUE(a.facts && b.facts);
    EXPECT_EQ(a.facts->num_labels, b.facts->num_labels);
    EXPECT_EQ(a.facts->text_prefix, b.facts->text_prefix);
    for (auto field :
         {&model::BatchFacts::modality_tokens, &model::BatchFacts::id_tokens, &model::BatchFacts::label_tokens}) {
      const auto &x = (*a.facts).*field, &y = (*b.facts).*field;
      ASSERT_EQ(x.size(), y.size());
      for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(values(x[i]), values(y[i]));
    }
  }
};

}  // namespace moegraft::data::test
