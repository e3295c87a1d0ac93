// data.batching modality: one combination of modalities a step, every document once, none dropped.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "data/mega_batches.h"
#include "moegraft/base/check.h"
#include "stream_fixture.h"

namespace moegraft::data {
namespace {

using test::kFirst;
using test::Lists;
using test::Longs;

// Text, captioned pictures and bare pictures; document i's first id (text or first code) says who it is.
struct Modality : test::StreamData {
  void SetUp() override {
    StreamData::SetUp();
    config.batching = Batching::modality;
    config.tokens_per_step = 60;
    std::vector<Lists> mixed;
    for (int32_t i = 0; i < 60; ++i) {
      const Lists::value_type text{0, std::vector<int32_t>(1 + (i * 7) % 11, 100 + i)},
          picture{1, {i % 5, (i / 5) % 5, (i / 25) % 5, 1}};
      if (i % 6 < 3)
        mixed.push_back({text});
      else if (i % 6 < 5)
        mixed.push_back({text, picture});
      else
        mixed.push_back({picture});
    }
    test::write_shards(folder / "mixed", test::kSchema, mixed, 200);
    config.train = {{(folder / "mixed").string(), 1.0}};
  }
  // Index of a document in folder/mixed, from its tokens; BOS comes first.
  static int64_t who(const Longs& ids) {
    if (ids[1] < kFirst) return ids[1] - 100;
    return (ids[2] - kFirst - 2) + 5 * (ids[3] - kFirst - 2) + 25 * (ids[4] - kFirst - 2);
  }
  static std::string kind(const Longs& ids) {
    const bool text = ids[1] < kFirst,
               picture = std::any_of(ids.begin(), ids.end(), [](int64_t id) { return id >= kFirst; });
    return text && picture ? "both" : text ? "text" : "picture";
  }
};

TEST_F(Modality, EveryDocumentOncePerEpochAndEveryStepOfOneKind) {
  auto s = stream();
  std::vector<std::vector<int64_t>> epochs;
  std::set<std::string> kinds;
  for (int epoch = 0; epoch < 4; ++epoch) {
    Longs order;
    int steps = 0;
    while (s.epochs() < epoch + 1) {
      const auto batch = whole(s.next());
      EXPECT_LE(batch.num_tokens(), config.tokens_per_step);
      std::set<std::string> here;
      int64_t length = 0;
      for (const auto& ids : sequences(batch)) {
        order.push_back(who(ids));
        here.insert(kind(ids));
        EXPECT_GE(static_cast<int64_t>(ids.size()), length) << "sorted by length";
        length = static_cast<int64_t>(ids.size());
      }
      EXPECT_EQ(here.size(), 1u);
      kinds.insert(here.begin(), here.end());
      ++steps;
    }
    EXPECT_EQ(s.epochs(), epoch + 1);
    EXPECT_EQ(s.counts().documents, 60 * (epoch + 1));
    EXPECT_GT(steps, 10);
    epochs.push_back(order);
    std::sort(order.begin(), order.end());
    Longs all(60);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(order, all);
  }
  EXPECT_EQ(kinds, (std::set<std::string>{"text", "both", "picture"}));
  EXPECT_EQ((std::set<Longs>{epochs.begin(), epochs.end()}).size(), 4u) << "each epoch has its own order";
  auto other = stream(18);
  Longs first;
  while (other.epochs() < 1)
    for (const auto& ids : sequences(whole(other.next()))) first.push_back(who(ids));
  EXPECT_NE(first, epochs[0]);
}

// Steps of a kind come mixed with those of another, not one kind after the other.
TEST_F(Modality, MegaBatchesAreShuffled) {
  auto s = stream();
  std::vector<std::string> order;
  while (s.epochs() < 1) order.push_back(kind(sequences(whole(s.next())).front()));
  int64_t changes = 0;
  for (size_t i = 1; i < order.size(); ++i) changes += order[i] != order[i - 1];
  EXPECT_GT(changes, 3);
}

class NoFeed : public DocumentFeed {
  const Document* current() override { return nullptr; }
  void advance() override {}
};

Document document(int64_t index, int64_t size, uint64_t modalities = 1) {
  Document d;
  d.index = index;
  d.outline.size = d.outline.stored_size = size;
  d.outline.modalities = modalities;
  d.outline.text_only = modalities == 1;
  d.outline.num_labels = size - 1;
  return d;
}

// Uni-MoE's sampler loses the last mega-batch of each type, even a full one.
TEST(MegaBatches, TheLastOfAKindIsKeptFullOrNot) {
  NoFeed none;
  const Packer packer{false, 10, 20};
  for (const int64_t count : {1, 2, 3, 4, 5, 6, 7, 8}) {  // of 10 tokens: two fill a mega-batch
    std::vector<Document> documents;
    for (int64_t i = 0; i < count; ++i)
      documents.push_back(document(i, 10)), documents.push_back(document(100 + i, 5, 3));
    const auto batches = cut_mega_batches(documents, packer, 1, 0, none);
    std::map<bool, int64_t> of_kind;
    std::set<int64_t> seen;
    for (const auto& batch : batches) {
      ++of_kind[batch[0].pieces[0].index >= 100];
      for (const auto& sequence : batch) EXPECT_TRUE(seen.insert(sequence.pieces[0].index).second);
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), 2 * count);
    EXPECT_EQ(of_kind[false], (count + 1) / 2);
    EXPECT_EQ(of_kind[true], (count + 3) / 4);
  }
}

TEST(MegaBatches, AreEvenWithinAKind) {
  NoFeed none;
  std::vector<Document> documents;
  for (int64_t i = 0; i < 21; ++i) documents.push_back(document(i, 10));
  for (const bool stream : {false, true}) {
    const auto batches = cut_mega_batches(documents, {stream, 10, 100}, 1, 0, none);
    Longs tokens;
    for (const auto& batch : batches) {
      tokens.push_back(0);
      for (const auto& sequence : batch) tokens.back() += sequence.tokens;
    }
    EXPECT_EQ(tokens, (Longs{70, 70, 70})) << "not 100, 100, 10";
  }
  EXPECT_TRUE(cut_mega_batches({}, {false, 10, 100}, 1, 0, none).empty());
}

TEST_F(Modality, StreamPackingLosesNoToken) {
  config.packing = Packing::stream;
  config.sequence_length = 16;
  std::vector<Lists> documents;
  for (int32_t i = 0; i < 40; ++i) {
    std::vector<int32_t> text(i % 9 == 0 ? 150 : 1 + i % 5, 100 + i);  // some longer than a step
    if (i % 2)
      documents.push_back({{0, std::vector<int32_t>(1 + i % 3, 100 + i)}, {1, {1, 2, 3, 4}}});
    else
      documents.push_back({{0, text}});
  }
  test::write_shards(folder / "long", test::kSchema, documents);
  config.train = {{(folder / "long").string(), 1.0}};
  auto s = stream();
  for (int epoch = 1; epoch <= 3; ++epoch) {
    std::map<int64_t, int64_t> count;
    do {  // to the window's end: a document's parts are shuffled too
      const auto batch = whole(s.next());
      bool picture = false, text = false;
      for (const auto& ids : sequences(batch)) {
        EXPECT_LE(ids.size(), 16u);
        const bool has = std::any_of(ids.begin(), ids.end(), [](int64_t id) { return id >= kFirst; });
        picture |= has, text |= !has;
        for (const int64_t id : ids)
          if (id >= 100 && id < kFirst) ++count[id - 100];
      }
      EXPECT_TRUE(picture != text);
    } while (s.state().find("\"window_used\":0") == std::string::npos);
    EXPECT_EQ(s.epochs(), epoch);
    for (int64_t i = 0; i < 40; ++i) EXPECT_EQ(count[i], i % 2 ? 1 + i % 3 : i % 9 == 0 ? 150 : 1 + i % 5) << i;
  }
}

// A dropped caption moves a document neither to other steps than its like nor to the short ones' end.
TEST_F(Modality, DroppedCaptionsStayAmongTheirLike) {
  config.train = {{(folder / "pictures").string(), 1.0}, {(folder / "text").string(), 1.0}};
  config.caption_dropout = 0.5;
  config.tokens_per_step = 40;
  auto s = stream();
  int64_t mixed = 0, dropped_alone = 0;
  for (int i = 0; i < 200; ++i) {
    const auto all = sequences(whole(s.next()));
    const auto dropped = std::count_if(all.begin(), all.end(), [](const Longs& ids) { return ids[1] == kFirst; });
    const auto texts = std::count_if(all.begin(), all.end(), [](const Longs& ids) {
      return std::none_of(ids.begin(), ids.end(), [](int64_t id) { return id >= kFirst; });
    });
    EXPECT_TRUE(texts == 0 || texts == static_cast<int64_t>(all.size()));
    if (texts > 0) continue;
    dropped == static_cast<int64_t>(all.size()) ? ++dropped_alone : ++mixed;
  }
  EXPECT_GT(mixed, 4 * dropped_alone);
}

TEST_F(Modality, WeightsAndLongDocumentsWork) {
  config.train = {
      {(folder / "text").string(), 1.0}, {(folder / "pictures").string(), 3.0}, {(folder / "mixed").string(), 0.0}};
  config.sequence_length = 9;  // pictures of three caption tokens do not fit
  auto s = stream();
  int64_t pictures = 0, all = 0;
  for (int i = 0; i < 400; ++i)
    for (const auto& ids : sequences(whole(s.next()))) {
      EXPECT_LE(ids.size(), 9u);
      ++all, pictures += kind(ids) != "text";
    }
  EXPECT_GT(s.counts().skipped, 0);
  // A third or so of the pictures is skipped.
  EXPECT_NEAR(double(pictures) / double(all), 3 * 9.0 / 13 / (1 + 3 * 9.0 / 13), 0.05);
  config.sequence_length = 4;
  config.train = {{(folder / "pictures").string(), 1.0}};
  try {
    stream().next();
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("no document fits in data.sequence_length 4"), std::string::npos) << e.what();
  }
}

TEST_F(Modality, RefusesACursorOfOtherBatchingOrOtherSizes) {
  const auto error = [](BatchStream stream, const std::string& state) -> std::string {
    try {
      stream.restore(state);
    } catch (const UserError& e) { return e.what(); }
    return "";
  };
  auto s = stream();
  s.next();
  const std::string state = s.state();
  EXPECT_EQ(error(stream(), state), "");
  config.tokens_per_step = 90;
  EXPECT_NE(error(stream(), state).find("may not change on resume"), std::string::npos);
  config.tokens_per_step = 60;
  config.batching = Batching::mixed;
  const std::string mixed = stream().state();
  EXPECT_NE(error(stream(), state).find("belongs to data.batching: modality"), std::string::npos);
  config.batching = Batching::modality;
  EXPECT_NE(error(stream(), mixed).find("belongs to data.batching: mixed"), std::string::npos);
  std::string broken = state;
  broken.replace(broken.find("\"window_used\":1"), 15, "\"window_used\":-1");
  EXPECT_NE(error(stream(), broken).find("broken"), std::string::npos);
}

}  // namespace
}  // namespace moegraft::data
