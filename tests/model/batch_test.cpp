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
  PackedBatch b{longs({1, 9, 10, 13, 0, 14, 2, 19}),
                longs({0, 0, 1, 1, 0, 2, 0, 2}),
                longs({0, 1, 2, 3, 0, 0, 1, 2}),
                {0, 4, 5, 8},
                longs({9, -100, 13, 9, -100, -100, 19, 3})};
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
    } catch (const UserError& e) { return e.what(); }
    return "";
  };
  EXPECT_EQ(error([](PackedBatch&) {}), "");
  EXPECT_NE(error([](PackedBatch& b) { b.ids_T[3] = 20; }).find("token id 20 is outside the vocabulary [0, 20)"),
            std::string::npos);
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

// 20 tokens of text, then 3 of a modality; 6 of text alone; 2 of a modality.
PackedBatch captions() {
  PackedBatch b{at::arange(31) % 10,
                at::zeros({31}, at::kLong),
                at::cat({at::arange(23), at::arange(6), at::arange(2)}),
                {0, 23, 29, 31},
                at::arange(31) % 9};
  for (const int64_t t : {20, 21, 22, 29, 30}) b.ids_T[t] = b.labels_T[t] = 10 + t % 4, b.modality_T[t] = 1;
  return b;
}

TEST(BatchFacts, HoldTheCutWhereTextComesFirst) {
  PackedBatch b = captions();
  const BatchFacts f = describe_batch(b, {0, 10, 14});
  ASSERT_NE(f.split, nullptr);
  const auto& [prefix, rest, prefix_tokens, rest_tokens] = *f.split;
  EXPECT_EQ(values(rest_tokens), (Longs{20, 21, 22, 29, 30}));
  EXPECT_EQ(prefix_tokens.numel(), 26);
  EXPECT_EQ(prefix.cu_seqlens, (Longs{0, 20, 26, 26}));
  EXPECT_EQ(rest.cu_seqlens, (Longs{0, 3, 3, 5}));
  for (const auto& [part, tokens] : {std::pair{&prefix, prefix_tokens}, {&rest, rest_tokens}}) {
    EXPECT_TRUE(at::equal(part->ids_T, b.ids_T.index_select(0, tokens)));
    EXPECT_TRUE(at::equal(part->labels_T, b.labels_T.index_select(0, tokens)));
    EXPECT_TRUE(at::equal(part->modality_T, b.modality_T.index_select(0, tokens)));
    EXPECT_TRUE(at::equal(part->positions_T, b.positions_T.index_select(0, tokens)));
    EXPECT_EQ(part->facts->longest, 23);
    EXPECT_EQ(part->facts->split, nullptr);
  }
  EXPECT_EQ(rest.facts->num_modalities, 2);
  EXPECT_EQ(prefix.facts->text_prefix_ids.size(), 26u);
  b.labels_T = at::Tensor();  // nothing to train on
  EXPECT_EQ(describe_batch(b, {0, 10, 14}).split, nullptr);
  EXPECT_EQ(describe_batch(batch(), {0, 10, 14, 20}).split, nullptr);  // three tokens of text
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

  b = captions();
  b.facts = std::make_shared<const BatchFacts>(describe_batch(b, {0, 10, 14}));
  const SplitBatch split = *to_device(b, at::Device(at::kMeta)).facts->split;
  for (const at::Tensor& t : {split.prefix_tokens, split.rest_tokens, split.prefix.ids_T, split.rest.labels_T,
                              split.rest.facts->label_tokens[1], split.prefix.facts->cu_seqlens})
    EXPECT_TRUE(t.is_meta());
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
