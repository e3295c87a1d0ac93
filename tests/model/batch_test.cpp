#include "moegraft/model/batch.h"

#include <gtest/gtest.h>

#include "../support/gpu.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/model/device.h"
#include "moegraft/model/vocabulary.h"

namespace moegraft::model {
namespace {

using Longs = std::vector<int64_t>;

at::Tensor longs(const Longs& values) { return at::tensor(at::ArrayRef<int64_t>(values), at::kLong); }
Longs values(const at::Tensor& t) { return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()}; }
std::vector<Longs> values(const std::vector<at::Tensor>& tensors) {
  std::vector<Longs> out;
  for (const auto& t : tensors) out.push_back(values(t));
  return out;
}

// Base ids [0, 10), one modality [10, 14), another [14, 20); three sequences of 4, 1 and 3 tokens.
PackedBatch batch() {
  PackedBatch b{longs({1, 9, 10, 13, 0, 14, 2, 19}), longs({0, 0, 1, 1, 0, 2, 0, 2}), longs({0, 1, 2, 3, 0, 0, 1, 2}), {0, 4, 5, 8}, longs({9, -100, 13, 9, -100, -100, 19, 3})};
  return b;
}

TEST(BatchFacts, SortsTokensByModalityIdAndLabel) {
  const BatchFacts f = describe_batch(batch(), {0, 10, 14, 20});
  EXPECT_EQ(f.id_bounds, (Longs{0, 10, 14, 20}));
  EXPECT_EQ(f.num_modalities, 3);
  EXPECT_EQ(values(f.modality_tokens), (std::vector<Longs>{{0, 1, 4, 6}, {2, 3}, {5, 7}}));
  EXPECT_EQ(values(f.id_tokens), (std::vector<Longs>{{0, 1, 4, 6}, {2, 3}, {5, 7}}));
  EXPECT_EQ(values(f.label_tokens), (std::vector<Longs>{{0, 3, 7}, {2}, {6}}));
  EXPECT_EQ(f.num_labels, 5);
  EXPECT_EQ(f.longest, 4);
  EXPECT_EQ(f.text_prefix, (Longs{2, 1, 0}));
  EXPECT_TRUE(at::equal(f.cu_seqlens, at::tensor({0, 4, 5, 8}, at::kInt)));
}

TEST(BatchFacts, ModalityAndIdsAreIndependent) {
  PackedBatch b = batch();
  b.modality_T = longs({0, 1, 0, 0, 0, 0, 0, 0});  // a text id may carry another modality
  const BatchFacts f = describe_batch(b, {0, 10, 14, 20});
  EXPECT_EQ(values(f.modality_tokens), (std::vector<Longs>{{0, 2, 3, 4, 5, 6, 7}, {1}}));
  EXPECT_EQ(values(f.id_tokens)[1], (Longs{2, 3}));
  EXPECT_EQ(f.text_prefix, (Longs{1, 1, 3}));
}

TEST(BatchFacts, TextAloneWithoutLabels) {
  const BatchFacts f = describe_batch(pack_rows(longs({1, 2, 3, 4, 5, 6}).view({2, 3})), {0, 10, 14});
  EXPECT_EQ(f.num_modalities, 1);
  EXPECT_EQ(values(f.modality_tokens), (std::vector<Longs>{{0, 1, 2, 3, 4, 5}}));
  EXPECT_EQ(values(f.id_tokens), (std::vector<Longs>{{0, 1, 2, 3, 4, 5}, {}}));
  EXPECT_TRUE(f.label_tokens.empty());
  EXPECT_EQ(f.num_labels, 0);
  EXPECT_EQ(f.text_prefix, (Longs{3, 3}));
}

TEST(BatchFacts, RefusesWhatIsOutside) {
  const auto error = [](auto change) -> std::string {
    PackedBatch b = batch();
    change(b);
    try {
      describe_batch(b, {0, 10, 14, 20});
    } catch (const UserError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(error([](PackedBatch&) {}), "");
  EXPECT_NE(error([](PackedBatch& b) { b.ids_T[3] = 20; }).find("token id 20 is outside the vocabulary [0, 20)"), std::string::npos);
  EXPECT_NE(error([](PackedBatch& b) { b.ids_T[3] = -1; }).find("token id -1"), std::string::npos);
  EXPECT_NE(error([](PackedBatch& b) { b.labels_T[3] = 20; }).find("label 20"), std::string::npos);
  EXPECT_NE(error([](PackedBatch& b) { b.modality_T[3] = -2; }).find("modality -2 of token 3"), std::string::npos);
  EXPECT_THROW(describe_batch(batch(), {0}), InvariantError);
}

TEST(BatchFacts, BoundsOfAVocabularyFollowItsModalities) {
  Vocabulary v;
  v.text_size = 100;
  EXPECT_EQ(v.id_bounds(), (Longs{0, 100}));
  v.modalities = {{"image", 1, 100, 6, 4}, {"audio", 2, 108, 3, 2}};
  EXPECT_EQ(v.id_bounds(), (Longs{0, 100, 108, 113}));
  EXPECT_EQ(v.id_bounds().back(), v.size());
}

// The meta device stands in for another one: it shows that every tensor moves.
TEST(BatchFacts, MoveWithTheBatch) {
  PackedBatch b = batch();
  b.facts = std::make_shared<const BatchFacts>(describe_batch(b, {0, 10, 14, 20}));
  EXPECT_EQ(to_device(b, at::kCPU).facts, b.facts);
  const PackedBatch moved = to_device(b, at::Device(at::kMeta));
  EXPECT_TRUE(moved.ids_T.is_meta() && moved.labels_T.is_meta());
  ASSERT_NE(moved.facts, nullptr);
  for (const auto* indices : {&moved.facts->modality_tokens, &moved.facts->id_tokens, &moved.facts->label_tokens})
    for (const at::Tensor& t : *indices) EXPECT_TRUE(t.is_meta());
  EXPECT_TRUE(moved.facts->cu_seqlens.is_meta());
  EXPECT_EQ(moved.facts->text_prefix, b.facts->text_prefix);
}

TEST(BatchFacts, PinnedCopiesHoldTheSame) {
  MOEGRAFT_NEEDS_GPU();
  PackedBatch b = batch();
  b.facts = std::make_shared<const BatchFacts>(describe_batch(b, {0, 10, 14, 20}));
  const PackedBatch pinned = pin(b), there = to_device(pinned, at::kCUDA);
  EXPECT_TRUE(pinned.ids_T.is_pinned() && pinned.facts->modality_tokens[1].is_pinned());
  EXPECT_TRUE(at::equal(pinned.labels_T, b.labels_T));
  EXPECT_TRUE(at::equal(there.ids_T.cpu(), b.ids_T));
  EXPECT_TRUE(at::equal(there.facts->label_tokens[0].cpu(), b.facts->label_tokens[0]));
  const BatchFacts from_device = describe_batch(there, {0, 10, 14, 20});
  EXPECT_TRUE(from_device.modality_tokens[1].is_cuda());
  EXPECT_TRUE(at::equal(from_device.modality_tokens[1].cpu(), b.facts->modality_tokens[1]));
}

}  // namespace
}  // namespace moegraft::model
