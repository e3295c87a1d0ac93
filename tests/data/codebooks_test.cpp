// Several modalities in one set: pictures whose codes are no square, and a sequence with two codebooks at each
// position, alone and beside each other in a document.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "moegraft/data/stream.h"
#include "moegraft/io/safetensors.h"
#include "tests_data.h"

namespace moegraft::data {
namespace {

using test::error_of;
using test::Lists;
using test::values;
using Longs = std::vector<int64_t>;
using Ids = std::vector<int32_t>;

// 2 x 3 codes of 5; 3 positions with a code of each of two codebooks of 4.
const Schema kSchema{{{"text", 1000, 0}, {"image", 5, 6, 1, {2, 3}}, {"sound", 8, 6, 2, {3}}}};
constexpr int64_t kImage = 1024, kSound = kImage + 2 + 5;

model::Vocabulary vocabulary() { return {1024, 1, 2, {{"image", 1, kImage, 5, 6}, {"sound", 2, kSound, 8, 6, 2}}}; }

Ids picture(int32_t i) { return {0, 1, 2, 3, 4, i % 5}; }
Ids sound(int32_t i) { return {0, 4, 1, 5, i % 4, 4 + i % 3}; }

struct Codebooks : ::testing::Test {
  test::Folder folder;
  DataConfig config;
  std::vector<Lists> documents;
  void SetUp() override {
    config.sequence_length = 32;
    config.tokens_per_step = 80;
    for (int32_t i = 0; i < 24; ++i) {
      Lists document{{0, Ids(size_t(1 + i % 3), 20 + i)}};
      if (i % 4 != 0) document.push_back({i % 4 == 2 ? 2 : 1, i % 4 == 2 ? sound(i) : picture(i)});
      if (i % 4 == 3) document.push_back({2, sound(i)});
      documents.push_back(document);
    }
    test::write_shards(folder / "set", kSchema, documents, 60);
    config.train = {{(folder / "set").string(), 1.0}};
  }
};

TEST_F(Codebooks, TheSetListsBothAndRoundTrips) {
  const ShardSet shards(folder / "set");
  EXPECT_EQ(shards.schema(), kSchema);
  shards.validate();
  ASSERT_EQ(shards.num_documents(), 24);
  for (int64_t i = 0; i < 24; ++i) EXPECT_EQ(test::to_lists(shards.document(i)), documents[size_t(i)]) << i;
  const io::SafetensorsFile file(folder / "set/shard-00000.safetensors");
  const auto& metadata = file.metadata();
  EXPECT_EQ(metadata.at("modalities"), "text,image,sound");
  EXPECT_EQ(metadata.at("positions_image"), "2x3");
  EXPECT_EQ(metadata.at("positions_sound"), "3");
  EXPECT_EQ(metadata.at("codebooks_sound"), "2");
  EXPECT_FALSE(metadata.contains("codebooks_image"));
  EXPECT_EQ(metadata.at("version"), "1");
}

TEST_F(Codebooks, ACodeOfAnotherCodebookIsRefusedWhenWrittenAndWhenRead) {
  ShardWriter writer(folder / "w", kSchema);
  const Ids swapped{4, 0, 1, 5, 0, 4}, late{0, 4, 1, 5, 0, 3}, second_item{0, 4, 1, 5, 0, 4, 0, 4, 5, 5, 0, 4};
  EXPECT_EQ(error_of([&] { writer.add({{2, swapped}}); }), "document 0: sound id 4 is outside [0, 4), codebook 0 of 2");
  EXPECT_EQ(error_of([&] { writer.add({{2, late}}); }), "document 0: sound id 3 is outside [4, 8), codebook 1 of 2");
  EXPECT_EQ(error_of([&] { writer.add({{2, second_item}}); }),
            "document 0: sound id 5 is outside [0, 4), codebook 0 of 2");
  const auto file = folder / "x.safetensors";
  io::save_safetensors(file,
                       {{"ids", at::tensor(late, at::kInt)},
                        {"modality", at::full({6}, 1, at::kByte)},
                        {"document_offsets", at::tensor(Longs{0, 6}, at::kLong)}},
                       {{"format", "moegraft.shard"},
                        {"version", "1"},
                        {"modalities", "text,sound"},
                        {"text_vocab", "10"},
                        {"codes_sound", "8"},
                        {"item_length_sound", "6"},
                        {"codebooks_sound", "2"}});
  EXPECT_NE(error_of([&] {
              ShardSet(file).validate();
            }).find("document 0 has sound id 3 at token 5, outside [4, 8), codebook 1 of 2"),
            std::string::npos);
}

TEST_F(Codebooks, ASequenceHoldsBothAndItsOutlineKnowsIt) {
  const Lists document{{0, {30}}, {1, picture(0)}, {2, sound(1)}};
  const auto s = assemble(test::to_segments(document), vocabulary(), config);
  const auto image = [](int64_t code) { return kImage + 2 + code; };
  const auto sound_code = [](int64_t code) { return kSound + 2 + code; };
  const Longs ids{1,
                  30,
                  kImage,
                  image(0),
                  image(1),
                  image(2),
                  image(3),
                  image(4),
                  image(0),
                  kImage + 1,
                  kSound,
                  sound_code(0),
                  sound_code(4),
                  sound_code(1),
                  sound_code(5),
                  sound_code(1),
                  sound_code(5),
                  kSound + 1};
  EXPECT_EQ(s.ids, ids);
  EXPECT_EQ(s.modality, (Longs{0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2}));
  for (size_t t = 0; t < ids.size(); ++t) {
    const bool learnt = t + 1 < ids.size() && ids[t + 1] >= kImage && ids[t + 1] != kImage && ids[t + 1] != kSound;
    EXPECT_EQ(s.labels[t], learnt ? ids[t + 1] : model::kNoLabel) << t;
  }
  const Outline o = outline(test::to_segments(document), vocabulary(), config);
  EXPECT_EQ(o.size, s.size());
  EXPECT_EQ(o.num_labels, 14);
  EXPECT_EQ(o.new_tokens, 16);
  EXPECT_EQ(o.modalities, 0b111u);
  EXPECT_FALSE(is_captioned_item(test::to_segments(document), vocabulary())) << "two items";
  EXPECT_TRUE(is_captioned_item(test::to_segments({{0, {30}}, {2, sound(1)}}), vocabulary()));
}

TEST_F(Codebooks, TheStreamPacksAllOfThemAndComesBack) {
  for (const Batching batching : {Batching::mixed, Batching::modality}) {
    config.batching = batching;
    BatchStream stream(config.train, config, vocabulary(), 17), again(config.train, config, vocabulary(), 17);
    std::map<int64_t, int64_t> seen;  // tokens by modality
    std::string middle;
    for (int b = 0; b < 12; ++b) {
      if (b == 7) middle = stream.state();
      const auto step = stream.next();
      ASSERT_EQ(step.micro_batches.size(), 1u);
      const auto& batch = step.micro_batches[0];
      const auto ids = values(batch.ids_T), modality = values(batch.modality_T);
      std::set<std::set<int64_t>> kinds;
      for (int64_t s = 0; s < batch.num_sequences(); ++s)
        kinds.insert(std::set<int64_t>(modality.begin() + batch.cu_seqlens[size_t(s)],
                                       modality.begin() + batch.cu_seqlens[size_t(s) + 1]));
      if (config.batching == Batching::modality) { EXPECT_EQ(kinds.size(), 1u); }
      for (size_t t = 0; t < ids.size(); ++t) {
        EXPECT_EQ(vocabulary().modality_of(ids[t]), modality[t]);
        ++seen[modality[t]];
      }
      if (b == 11) {
        again.restore(middle);
        for (int k = 7; k < 11; ++k) again.skip();
        EXPECT_EQ(values(again.next().micro_batches[0].ids_T), ids);
      }
    }
    EXPECT_EQ(seen.size(), 3u) << config::name_of(batching);
  }
  EvalStream eval(config.train, config, vocabulary());
  int64_t tokens = 0, expected = 0;
  for (const auto& document : documents) {
    const auto segments = test::to_segments(document);
    expected += outline(segments, vocabulary(), config).size;
  }
  while (auto batch = eval.next()) tokens += batch->num_tokens();
  EXPECT_EQ(tokens, expected);
}

TEST_F(Codebooks, NoiseStaysInItsCodebook) {
  const auto v = vocabulary();
  const auto clean = assemble(test::to_segments({{2, sound(1)}}), v, config);
  Rng rng(3, "test");
  std::set<int64_t> seen[2];
  for (int n = 0; n < 200; ++n) {
    Sequence noisy = clean;
    replace_codes(noisy, v, 1.0, rng);
    EXPECT_EQ(noisy.labels, clean.labels);
    for (size_t t = 0; t < noisy.ids.size(); ++t) {
      const int64_t code = clean.ids[t] - v.modalities[1].code_id(0), now = noisy.ids[t] - v.modalities[1].code_id(0);
      if (code < 0) {
        EXPECT_EQ(noisy.ids[t], clean.ids[t]);  // BOS, begin, end
        continue;
      }
      EXPECT_EQ(now / 4, code / 4);
      seen[code / 4].insert(now);
    }
  }
  EXPECT_EQ(seen[0], (std::set<int64_t>{0, 1, 2, 3}));
  EXPECT_EQ(seen[1], (std::set<int64_t>{4, 5, 6, 7}));
}

TEST_F(Codebooks, EachModalityIsComparedWithTheRuns) {
  const auto error = [&](const std::function<void(model::Vocabulary&)>& change) {
    auto v = vocabulary();
    change(v);
    return error_of([&] { Source((folder / "set").string(), v); });
  };
  EXPECT_EQ(error([](auto&) {}), "");
  EXPECT_NE(error([](auto& v) {
              v.modalities[1].codebooks = 1;
            }).find("sound codes come from 2 codebook(s) at each position, the run's from 1"),
            std::string::npos);
  EXPECT_NE(error([](auto& v) {
              v.modalities[1].num_codes = 10;
            }).find("sound codes come from a codebook of 8, the run's has 10"),
            std::string::npos);
  EXPECT_NE(error([](auto& v) { v.modalities[0].item_length = 8; }).find("a image has 6 codes, the run's has 8"),
            std::string::npos);
  EXPECT_NE(error([](auto& v) {
              v.modalities.pop_back();
            }).find("holds the modality \"sound\", which the run does not have (its modalities: image)"),
            std::string::npos);
  // A run may have them in another order: they are found by name.
  const model::Vocabulary turned{1024, 1, 2, {{"sound", 1, 1024, 8, 6, 2}, {"image", 2, 1034, 5, 6}}};
  const Source source((folder / "set").string(), turned);
  EXPECT_EQ(test::to_lists(source.document(1)), (Lists{{0, Ids(2, 21)}, {2, picture(1)}}));
}

}  // namespace
}  // namespace moegraft::data
