#include "moegraft/data/stream.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "moegraft/base/check.h"
#include "stream_fixture.h"

namespace moegraft::data {
namespace {

using test::kFirst;
using test::Lists;
using test::values;
using test::vocabulary;
using Longs = std::vector<int64_t>;

int64_t code(int64_t c) { return kFirst + 2 + c; }
using Data = test::StreamData;
constexpr int64_t kBegin = kFirst, kEnd = kFirst + 1, kNone = model::kNoLabel;

Sequence assembled(const Lists& document, const DataConfig& config = {}, bool drop = false) {
  return assemble(test::to_segments(document), vocabulary(), config, drop);
}

TEST(Assemble, TextAlonePredictsEveryToken) {
  const auto s = assembled({{0, {10, 11, 12}}});
  EXPECT_EQ(s.ids, (Longs{1, 10, 11, 12, 2}));
  EXPECT_EQ(s.labels, (Longs{10, 11, 12, 2, kNone}));
  EXPECT_EQ(s.modality, (Longs(5, 0)));
  EXPECT_TRUE(s.text_only);
  DataConfig bare;
  bare.add_bos = bare.add_eos = false;
  EXPECT_EQ(assembled({{0, {10, 11}}}, bare).ids, (Longs{10, 11}));
  EXPECT_EQ(assembled({{0, {10, 11}}}, bare).labels, (Longs{11, kNone}));
}

TEST(Assemble, CaptionedPicturePredictsCodesAndEnd) {
  const Lists document = {{0, {10, 11}}, {1, {3, 0, 4, 3}}};
  const auto s = assembled(document);
  EXPECT_EQ(s.ids, (Longs{1, 10, 11, kBegin, code(3), code(0), code(4), code(3), kEnd}));
  EXPECT_EQ(s.modality, (Longs{0, 0, 0, 1, 1, 1, 1, 1, 1}));
  EXPECT_EQ(s.labels, (Longs{kNone, kNone, kNone, code(3), code(0), code(4), code(3), kEnd, kNone}));
  EXPECT_FALSE(s.text_only);
  DataConfig with_captions;
  with_captions.caption_labels = true;
  EXPECT_EQ(assembled(document, with_captions).labels,
            (Longs{10, 11, kNone, code(3), code(0), code(4), code(3), kEnd, kNone}));
  const auto dropped = assembled(document, with_captions, true);
  EXPECT_EQ(dropped.ids, (Longs{1, kBegin, code(3), code(0), code(4), code(3), kEnd}));
  EXPECT_EQ(dropped.labels, (Longs{kNone, code(3), code(0), code(4), code(3), kEnd, kNone}));
}

TEST(Assemble, TwoPicturesThenText) {
  const Lists document = {{1, {0, 1, 2, 3, 4, 4, 4, 4}}, {0, {10}}};
  const auto s = assembled(document);
  EXPECT_EQ(s.ids, (Longs{1, kBegin, code(0), code(1), code(2), code(3), kEnd, kBegin, code(4), code(4), code(4),
                          code(4), kEnd, 10, 2}));
  EXPECT_EQ(s.labels[6], kNone);  // the second begin is forced too
  EXPECT_EQ(s.labels[7], code(4));
  EXPECT_EQ(s.labels[11], kEnd);
  EXPECT_EQ((Longs{s.labels.end() - 3, s.labels.end()}), (Longs{kNone, kNone, kNone}));
  EXPECT_FALSE(is_captioned_item(test::to_segments(document), vocabulary()));
  const Lists captioned = {{0, {10}}, {1, {0, 1, 2, 3}}}, alone = {{1, {0, 1, 2, 3}}};
  EXPECT_TRUE(is_captioned_item(test::to_segments(captioned), vocabulary()));
  EXPECT_FALSE(is_captioned_item(test::to_segments(alone), vocabulary()));
}

TEST(Assemble, PackLaysSequencesEndToEnd) {
  const auto batch = pack({assembled({{0, {10}}}), assembled({{0, {11, 12}}, {1, {0, 1, 2, 3}}})});
  EXPECT_EQ(batch.cu_seqlens, (Longs{0, 3, 12}));
  EXPECT_EQ(values(batch.positions_T), (Longs{0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(batch.labels_T.size(0), 12);
  EXPECT_EQ(batch.num_sequences(), 2);
}

TEST_F(Data, EveryDocumentOncePerEpoch) {
  auto s = stream();
  std::map<int64_t, Longs> order;  // per source: the documents in the order they came
  while (order[0].size() < 90 || order[1].size() < 39)
    for (const auto& ids : sequences(whole(s.next()))) order[ids[1] >= 420].push_back(ids[1]);
  for (auto [source, n] : {std::pair{0, 30}, {1, 13}}) {
    std::set<Longs> orders;
    for (int epoch = 0; epoch < 3; ++epoch) {
      Longs part(order[source].begin() + epoch * n, order[source].begin() + (epoch + 1) * n);
      orders.insert(part);
      std::sort(part.begin(), part.end());
      for (int i = 0; i < n; ++i) EXPECT_EQ(part[i], 20 + source * 400 + i);
    }
    EXPECT_EQ(orders.size(), 3u) << "each epoch has its own order";
  }
}

TEST_F(Data, PackedWithoutPaddingAndWithinTheBudget) {
  auto s = stream();
  for (int b = 0; b < 20; ++b) {
    const auto batch = whole(s.next());
    EXPECT_LE(batch.num_tokens(), 60);
    EXPECT_GT(batch.num_tokens(), 60 - 24);
    EXPECT_EQ(batch.cu_seqlens.back(), batch.num_tokens());
    for (const auto& ids : sequences(batch)) {
      EXPECT_EQ(ids.front(), 1);
      EXPECT_TRUE(ids.back() == 2 || ids.back() == kEnd);
      EXPECT_EQ(std::count(ids.begin(), ids.end(), kBegin), ids[1] >= 420);
    }
    const auto ids = values(batch.ids_T), modality = values(batch.modality_T);
    for (size_t t = 0; t < ids.size(); ++t) EXPECT_EQ(modality[t], ids[t] >= kFirst);
  }
}

TEST_F(Data, FactsCountWhatTheBatchHolds) {
  auto s = stream();
  EvalStream eval(config.train, config, vocabulary());
  for (const auto& batch : {whole(s.next()), *eval.next()}) {
    ASSERT_NE(batch.facts, nullptr);
    const auto ids = values(batch.ids_T), labels = values(batch.labels_T), modality = values(batch.modality_T);
    EXPECT_EQ(batch.facts->id_bounds, (Longs{0, kFirst, kFirst + 7}));
    EXPECT_EQ(batch.facts->num_labels, std::count_if(labels.begin(), labels.end(), [](int64_t l) { return l >= 0; }));
    EXPECT_EQ(batch.facts->label_tokens[1].size(0),
              std::count_if(labels.begin(), labels.end(), [](int64_t l) { return l >= kFirst; }));
    for (int64_t i = 0; i < batch.num_sequences(); ++i) {
      const auto begin = modality.begin() + batch.cu_seqlens[i], end = modality.begin() + batch.cu_seqlens[i + 1];
      EXPECT_EQ(batch.facts->text_prefix[i], std::find(begin, end, 1) - begin);
    }
  }
}

// What the stream gave when every process drew micro-batches of its own, with the cursor of that time.
TEST_F(Data, OneProcessGetsTheBatchesItAlwaysGot) {
  config.caption_dropout = 0.5;
  config.sequence_length = 9;
  for (
      const auto& [packing, expected, cursor] :
      {std::tuple(
           Packing::documents, 3875596617002253661ull,
           R"({"documents":[30,13],"draws":949,"offset":0,"seed":17,"skipped":48,"taken":[630,319],"truncated":0,"version":1})"),
       {Packing::stream, 14765556610395030359ull,
        R"({"documents":[30,13],"draws":975,"offset":1,"seed":17,"skipped":49,"taken":[647,328],"truncated":0,"version":1})"}}) {
    config.packing = packing;
    auto s = stream();
    uint64_t hash = 14695981039346656037ull;
    const auto mix = [&](const Longs& list) {
      for (int64_t x : list) hash = (hash ^ static_cast<uint64_t>(x + 1000)) * 1099511628211ull;
    };
    for (int b = 0; b < 100; ++b) {
      const auto batch = whole(s.next());
      mix(batch.cu_seqlens), mix(values(batch.ids_T)), mix(values(batch.modality_T)), mix(values(batch.labels_T)),
          mix(values(batch.positions_T));
    }
    EXPECT_EQ(hash, expected) << config::name_of(packing);
    EXPECT_EQ(s.state(), cursor);
  }
}

TEST_F(Data, RestoredStreamGoesOnBitForBit) {
  for (const Packing packing : {Packing::documents, Packing::stream}) {
    config.packing = packing;
    config.caption_dropout = 0.5;
    auto reference = stream();
    std::vector<model::PackedBatch> batches;
    std::vector<std::string> states;
    for (int b = 0; b < 40; ++b) {
      states.push_back(reference.state());
      batches.push_back(whole(reference.next()));
    }
    for (int b = 0; b < 40; b += 3) {
      auto resumed = stream();
      resumed.next();  // whatever it did before
      resumed.restore(states[b]);
      EXPECT_EQ(resumed.state(), states[b]);
      for (int c = b; c < std::min(b + 5, 40); ++c) expect_equal(whole(resumed.next()), batches[c]);
    }
  }
}

TEST_F(Data, OrderDependsOnTheSeedNotOnTheBudget) {
  auto documents = [&](uint64_t seed, int64_t budget) {
    config.tokens_per_step = budget;
    auto s = stream(seed);
    Longs out;
    while (out.size() < 100)
      for (const auto& ids : sequences(whole(s.next()))) out.push_back(ids[1]);
    out.resize(100);
    return out;
  };
  EXPECT_EQ(documents(17, 30), documents(17, 200));
  EXPECT_NE(documents(17, 30), documents(18, 30));
}

TEST_F(Data, WeightsSetTheShares) {
  config.train[0].weight = 1.0, config.train[1].weight = 3.0;
  auto s = stream();
  int64_t pictures = 0, all = 0;
  for (int b = 0; b < 400; ++b)
    for (const auto& ids : sequences(whole(s.next()))) pictures += ids[1] >= 420, ++all;
  EXPECT_NEAR(static_cast<double>(pictures) / all, 0.75,
              4 * std::sqrt(0.75 * 0.25 / all));  // four standard deviations of a binomial share
  config.train[1].weight = 0.0;
  auto text = stream();
  for (int b = 0; b < 20; ++b) EXPECT_EQ(whole(text.next()).modality_T.sum().item<int64_t>(), 0);
}

// Item i has i + 1 captions 100 + 10 i + j; by document the last would come five times as often as the first.
TEST_F(Data, ItemsAreDrawnEquallyOftenWithOneOfTheirDocuments) {
  ShardWriter writer(folder / "items", test::kSchema, false, 8);
  for (int32_t i = 0; i < 5; ++i)
    for (int32_t j = 0; j <= i; ++j) writer.add(test::to_segments({{0, {100 + 10 * i + j}}, {1, {0, 1, i, 0}}}), j > 0);
  writer.finish();
  config.train = {{(folder / "items").string(), 1.0, "item"}};
  auto s = stream();
  std::map<int64_t, std::map<int64_t, int64_t>> seen;
  int64_t drawn = 0;
  const int64_t epochs = 200;
  std::string middle;
  std::vector<Longs> after;
  while (drawn < 5 * epochs) {
    for (const auto& ids : sequences(whole(s.next()))) {
      if (!middle.empty() && after.size() < 20) after.push_back(ids);
      if (drawn < 5 * epochs) ++seen[(ids[1] - 100) / 10][ids[1] - 100], ++drawn;
    }
    if (middle.empty() && drawn > 12) middle = s.state();
  }
  ASSERT_EQ(seen.size(), 5u);
  for (const auto& [item, captions] : seen) {
    int64_t sum = 0;
    EXPECT_EQ(int64_t(captions.size()), item + 1) << "every caption comes";
    for (const auto& [caption, count] : captions) {
      sum += count;
      EXPECT_NEAR(double(count) / epochs, 1.0 / double(item + 1), 4 * std::sqrt(0.25 / epochs));
    }
    EXPECT_EQ(sum, epochs) << "item " << item << " comes once an epoch";
  }
  auto again = stream();
  again.restore(middle);
  std::vector<Longs> restored;
  while (restored.size() < after.size())
    for (const auto& ids : sequences(whole(again.next())))
      if (restored.size() < after.size()) restored.push_back(ids);
  EXPECT_EQ(restored, after);
}

TEST_F(Data, BosOfOneSource) {
  config.train[1].add_bos = false;
  config.eval = config.train;
  auto s = stream();
  EvalStream eval(config.eval, config, vocabulary());
  const auto check = [](const std::vector<Longs>& all) {
    for (const auto& ids : all)
      EXPECT_EQ(ids[0] == 1, std::none_of(ids.begin(), ids.end(), [](int64_t id) { return id >= kFirst; }));
  };
  for (int b = 0; b < 20; ++b) check(sequences(whole(s.next())));
  while (const auto batch = eval.next()) check(sequences(*batch));
}

TEST_F(Data, CaptionDropoutLeavesBosAndThePicture) {
  config.train = {{(folder / "pictures").string(), 1.0}};
  config.caption_dropout = 0.3;
  auto s = stream();
  int64_t dropped = 0, all = 0;
  for (int b = 0; b < 300; ++b)
    for (const auto& ids : sequences(whole(s.next()))) {
      ++all;
      if (ids[1] != kBegin) continue;
      ++dropped;
      EXPECT_EQ(ids.size(), 7u);
    }
  EXPECT_NEAR(static_cast<double>(dropped) / all, 0.3, 4 * std::sqrt(0.3 * 0.7 / all));
}

TEST_F(Data, CaptionNoiseIsReadBesideAPicture) {
  auto plain = stream();
  config.caption_noise = 0.5, config.eval = config.train;
  auto noisy = stream();
  int64_t words = 0, replaced = 0;
  for (int b = 0; b < 60; ++b) {
    const auto a = whole(plain.next()), n = whole(noisy.next());
    EXPECT_EQ(values(a.labels_T), values(n.labels_T));
    const auto before = sequences(a), after = sequences(n);
    for (size_t s = 0; s < before.size(); ++s) {
      const bool picture = std::any_of(before[s].begin(), before[s].end(), [](int64_t id) { return id >= kFirst; });
      for (size_t t = 0; t < before[s].size(); ++t) {
        if (!picture || t == 0 || before[s][t] >= kFirst || before[s][t] == vocabulary().eos_id) {
          EXPECT_EQ(before[s][t], after[s][t]);  // documents of text alone, BOS, EOS, the picture
          continue;
        }
        EXPECT_TRUE(after[s][t] >= 0 && after[s][t] < vocabulary().text_size);
        ++words, replaced += before[s][t] != after[s][t];
      }
    }
  }
  const double share = 0.5 * (1 - 1.0 / static_cast<double>(vocabulary().text_size));
  EXPECT_NEAR(double(replaced) / double(words), share, 4 * std::sqrt(share * (1 - share) / double(words)));
  EvalStream eval(config.eval, config, vocabulary());
  config.caption_noise = 0;
  EvalStream clean(config.eval, config, vocabulary());
  while (const auto batch = eval.next()) expect_equal(*batch, *clean.next());
}

TEST_F(Data, CodeNoiseIsReadNotLearnt) {
  auto plain = stream();
  config.code_noise = 0.5, config.eval = config.train;
  auto noisy = stream();
  int64_t codes = 0, replaced = 0;
  std::string middle;
  model::PackedBatch last;
  for (int b = 0; b < 60; ++b) {
    if (b == 59) middle = noisy.state();
    const auto a = whole(plain.next()), n = whole(noisy.next());
    EXPECT_EQ(values(a.labels_T), values(n.labels_T));
    EXPECT_EQ(values(a.modality_T), values(n.modality_T));
    const auto before = values(a.ids_T), after = values(n.ids_T);
    for (size_t t = 0; t < before.size(); ++t) {
      const int64_t code = before[t] - vocabulary().modalities[0].code_id(0);
      if (code < 0) {
        EXPECT_EQ(before[t], after[t]);  // text, begin and end
        continue;
      }
      EXPECT_TRUE(after[t] >= vocabulary().modalities[0].code_id(0) &&
                  after[t] < vocabulary().modalities[0].code_id(5));
      ++codes, replaced += before[t] != after[t];
    }
    last = n;
  }
  const double share = 0.5 * 4 / 5;  // one random code of five is the true one
  EXPECT_NEAR(double(replaced) / double(codes), share, 4 * std::sqrt(share * (1 - share) / double(codes)));
  auto again = stream();
  again.restore(middle);
  expect_equal(whole(again.next()), last);
  EvalStream eval(config.eval, config, vocabulary());
  config.code_noise = 0;
  EvalStream clean(config.eval, config, vocabulary());
  while (const auto batch = eval.next()) expect_equal(*batch, *clean.next());
}

TEST_F(Data, StreamPackingJoinsTextAndFillsTheBudget) {
  config.packing = Packing::stream;
  config.sequence_length = 8;
  config.tokens_per_step = 20;
  config.train = {{(folder / "text").string(), 1.0}};
  auto s = stream();
  Longs joined, labels;
  for (int b = 0; b < 30; ++b) {
    const auto batch = whole(s.next());
    EXPECT_EQ(batch.cu_seqlens, (Longs{0, 8, 16, 20}));
    EXPECT_EQ(values(batch.positions_T)[17], 1);
    for (int64_t id : values(batch.ids_T)) joined.push_back(id);
    for (int64_t id : values(batch.labels_T)) labels.push_back(id);
  }
  // No token is lost or doubled where a document is cut: a document of id x has 1 + (x - 20) % 7 of them between BOS
  // and EOS.
  ASSERT_EQ(joined[0], 1);
  for (size_t t = 0; t + 10 < joined.size();) {
    const int64_t id = joined[t + 1], length = 1 + (id - 20) % 7;
    for (int64_t i = 1; i <= length; ++i) ASSERT_EQ(joined[t + i], id);
    ASSERT_EQ(joined[t + length + 1], 2);
    t += length + 2;
  }
  for (size_t t = 0; t + 1 < joined.size(); ++t) EXPECT_EQ(labels[t], joined[t] == 2 ? kNone : joined[t + 1]) << t;
}

TEST_F(Data, StreamPackingKeepsPicturesWhole) {
  config.packing = Packing::stream;
  config.sequence_length = 16;
  auto s = stream();
  int64_t pictures = 0;
  for (int b = 0; b < 60; ++b)
    for (const auto& ids : sequences(whole(s.next()))) {
      EXPECT_LE(ids.size(), 16u);
      if (std::count(ids.begin(), ids.end(), kBegin) == 0) continue;
      ++pictures;
      EXPECT_EQ(ids.front(), 1);
      EXPECT_EQ(ids.back(), kEnd);
    }
  EXPECT_GT(pictures, 50);
}

TEST_F(Data, LongTextIsCutAndLongPicturesAreSkipped) {
  config.sequence_length = 8;  // text up to 9 tokens with BOS and EOS; pictures 8 to 10
  config.tokens_per_step = 40;
  auto s = stream();
  for (int b = 0; b < 30; ++b)
    for (const auto& ids : sequences(whole(s.next()))) EXPECT_LE(ids.size(), 8u);
  EXPECT_GT(s.counts().truncated, 0);
  EXPECT_GT(s.counts().skipped, 0);
  config.sequence_length = 4;
  config.train = {{(folder / "pictures").string(), 1.0}};
  try {
    stream().next();
    FAIL();
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("no document fits in data.sequence_length 4"), std::string::npos) << e.what();
  }
}

TEST_F(Data, EvaluationGoesOnceThroughInOrder) {
  EvalStream eval(config.train, config, vocabulary());
  auto run = [&] {
    Longs seen;
    while (auto batch = eval.next())
      for (const auto& ids : sequences(*batch)) seen.push_back(ids[1]);
    return seen;
  };
  const Longs seen = run();
  ASSERT_EQ(seen.size(), 43u);
  for (int64_t i = 0; i < 43; ++i) EXPECT_EQ(seen[i], i < 30 ? 20 + i : 420 + i - 30);
  eval.rewind();
  EXPECT_EQ(run(), seen);
  EvalStream some(config.train, config, vocabulary(), 50);
  int64_t tokens = 0, pictures = 0;
  while (auto batch = some.next())
    tokens += batch->num_tokens(), pictures += batch->modality_T.eq(1).any().item<bool>();
  EXPECT_LE(tokens, 50);
  EXPECT_GT(pictures, 0);
}

TEST_F(Data, RefusesWhatDoesNotFitTogether) {
  auto error = [](const std::function<void()>& act) -> std::string {
    try {
      act();
    } catch (const UserError& e) { return e.what(); }
    return "";
  };
  auto v = vocabulary();
  v.text_size = 900;
  EXPECT_NE(error([&] { BatchStream(config.train, config, v, 1); }).find("vocabulary has 900"), std::string::npos);
  v = vocabulary();
  v.modalities[0].num_codes = 6;
  EXPECT_NE(error([&] { BatchStream(config.train, config, v, 1); }).find("codebook of 5, the run's has 6"),
            std::string::npos);
  v = vocabulary();
  v.modalities[0].item_length = 9;
  EXPECT_NE(error([&] { BatchStream(config.train, config, v, 1); }).find("has 4 codes, the run's has 9"),
            std::string::npos);
  v = vocabulary();
  v.modalities.clear();
  EXPECT_NE(error([&] { BatchStream(config.train, config, v, 1); }).find("\"image\", which the run does not have"),
            std::string::npos);
  EXPECT_NE(error([&] { BatchStream({}, config, vocabulary(), 1); }).find("data.train must name"), std::string::npos);
  auto small = config;
  small.tokens_per_step = 23;
  EXPECT_NE(error([&] { BatchStream(small.train, small, vocabulary(), 1); }).find("at least data.sequence_length (24)"),
            std::string::npos);
  auto none = config;
  none.train[0].weight = none.train[1].weight = 0;
  EXPECT_NE(error([&] { BatchStream(none.train, none, vocabulary(), 1); }).find("must not all be 0"),
            std::string::npos);

  auto s = stream();
  const std::string state = s.state();
  EXPECT_NE(error([&] { s.restore("{"); }).find("not one of version 1 or 2"), std::string::npos);
  EXPECT_NE(error([&] { s.restore("{\"version\":1}"); }).find("broken"), std::string::npos);
  EXPECT_NE(error([&] { stream(18).restore(state); }).find("belongs to seed 17"), std::string::npos);
  auto less = config;
  less.train.pop_back();
  EXPECT_NE(
      error([&] { BatchStream(less.train, less, vocabulary(), 17).restore(state); }).find("may not change on resume"),
      std::string::npos);
}

}  // namespace
}  // namespace moegraft::data
