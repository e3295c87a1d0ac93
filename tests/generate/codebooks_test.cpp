// Drawing items of a modality that is no picture: a sequence of three positions with a code of each of two codebooks.
#include <gtest/gtest.h>

#include <set>

#include "fixture.h"

namespace moegraft::generate {
namespace {

using namespace testing;

constexpr int64_t kBooks = 2, kSize = 4, kSoundCodes = kBooks * kSize, kSoundLength = 6, kSound = kText + kCodes + 2;

class FrameCodec : public codec::Codec {
 public:
  std::string architecture() const override { return "frames"; }
  codec::CodeShape shape() const override { return {{3}, kBooks}; }
  int64_t codebook_size() const override { return kSize; }
  at::Tensor codebook_NZ() const override { return at::arange(kSoundCodes, at::kFloat).unsqueeze(1); }
  void to(at::Device) override {}
};

graft::GraftedModel two_modalities() {
  graft::GraftedModel m = tiny_graft();
  const FrameCodec codec;
  m.vocabulary.modalities.push_back(
      {"sound", 2, kSound, codec.num_codes(), codec.item_length(), codec.shape().codebooks});
  m.codecs["sound"] = std::make_shared<FrameCodec>();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(12);
  const auto normal = [&](double std) {
    return at::empty({kSoundCodes + 2, m.decoder->spec().hidden_size}, at::kFloat).normal_(0.0, std, generator);
  };
  m.decoder->attach_rows({2, kSound, normal(1.0), normal(0.5)});
  return m;
}

ImageOptions sounds() {
  ImageOptions o;
  o.modality = "sound", o.pixels = false;
  return o;
}

PromptTokens append_sound(PromptTokens tokens, const at::Tensor& ids_L) {
  tokens.ids.push_back(kSound);
  for (int64_t i = 0; i < ids_L.size(0); ++i) tokens.ids.push_back(kSound + 2 + ids_L[i].item<int64_t>());
  tokens.modality.resize(tokens.ids.size(), 2);
  return tokens;
}

TEST(Codebooks, TheVocabularysPlacesAreTheCodecs) {
  const auto m = two_modalities();
  for (const auto& tokens : m.vocabulary.modalities) {
    const codec::Codec& codec = *m.codecs.at(tokens.name);
    EXPECT_EQ(tokens.codebook_size(), codec.codebook_size());
    EXPECT_EQ(tokens.item_length, codec.item_length());
    for (int64_t place = 0; place < tokens.item_length; ++place)
      EXPECT_EQ(tokens.first_code(place), place % codec.shape().codebooks * codec.codebook_size());
  }
  EXPECT_EQ(m.vocabulary.size(), kSound + kSoundCodes + 2);
}

TEST(Codebooks, EveryPlaceIsDrawnFromItsCodebook) {
  const auto m = two_modalities();
  // Every place would take a code of the other codebook, begin or end: the first codebook's rows are made large, and
  // those of begin and end larger.
  const at::NoGradGuard no_grad;
  at::Tensor head = m.decoder->rows()[1].head_ND;
  head.narrow(0, 2, kSize).mul_(100);
  head.narrow(0, 0, 2).copy_(head.narrow(0, 2, 2) * 10);
  ImageOptions o = sounds();
  o.n = 40, o.sampling.temperature = 1000;
  std::set<int64_t> seen;
  for (const double cfg : {1.0, 2.0})
    for (const int64_t top_k : {0, 2}) {
      o.cfg = cfg, o.sampling.top_k = top_k;
      for (const auto& r : generate_images(m, std::vector<std::string>{"a", "bell"}, o)) {
        ASSERT_EQ(r.ids_L.sizes(), at::IntArrayRef({kSoundLength}));
        EXPECT_FALSE(r.pixels_3HW.defined());
        for (int64_t i = 0; i < kSoundLength; ++i) {
          const int64_t code = r.ids_L[i].item<int64_t>();
          EXPECT_EQ(code / kSize, i % kBooks) << "place " << i;
          seen.insert(code);
        }
      }
    }
  EXPECT_EQ(seen.size(), size_t(kSoundCodes));
}

TEST(Codebooks, GreedyPicksTheBestCodeOfTheCodebook) {
  const auto m = two_modalities();
  const at::NoGradGuard no_grad;
  ImageOptions o = sounds();
  o.sampling.temperature = 0;
  for (const auto steps : {DecodeSteps::plain, DecodeSteps::fixed}) {
    o.steps = steps;
    const auto ids_L = generate_images(m, std::vector<std::string>{"a bell"}, o)[0].ids_L;
    const PromptTokens prompt = tokenize(m, text_prompt("a bell")), whole = append_sound(prompt, ids_L);
    model::PackedBatch batch;
    batch.ids_T = at::tensor(at::ArrayRef<int64_t>(whole.ids), at::kLong);
    batch.modality_T = at::tensor(at::ArrayRef<int64_t>(whole.modality), at::kLong);
    batch.positions_T = at::arange(whole.size(), at::kLong);
    batch.cu_seqlens = {0, whole.size()};
    const at::Tensor logits = m.decoder->modality_logits(m.decoder->forward(batch).hidden_TD, 1)
                                  .narrow(1, 2, kSoundCodes)
                                  .narrow(0, prompt.size(), kSoundLength);
    for (int64_t i = 0; i < kSoundLength; ++i) {
      const int64_t first = i % kBooks * kSize;
      EXPECT_EQ(ids_L[i].item<int64_t>(), first + logits[i].narrow(0, first, kSize).argmax().item<int64_t>()) << i;
    }
  }
}

TEST(Codebooks, APromptTakesCodesAtTheirPlacesAlone) {
  const auto m = two_modalities();
  const auto with = [](std::vector<int64_t> codes) { return Prompt{{"sound", "", {}, at::tensor(codes, at::kLong)}}; };
  const PromptTokens tokens = tokenize(m, with({0, 4, 3, 7, 1, 5}));
  EXPECT_EQ(tokens.ids, (std::vector<int64_t>{kBos, kSound, kSound + 2, kSound + 6, kSound + 5, kSound + 9, kSound + 3,
                                              kSound + 7, kSound + 1}));
  EXPECT_EQ(message_of<UserError>([&] { tokenize(m, with({0, 3, 0, 4, 0, 4})); }),
            "code 3 of sound is outside [4, 8), the codebook of place 1");
  EXPECT_EQ(message_of<UserError>([&] { tokenize(m, with({0, 4, 4, 4, 0, 4})); }),
            "code 4 of sound is outside [0, 4), the codebook of place 2");
}

TEST(Codebooks, ACodecOfAnotherKindMakesNoPictures) {
  const auto m = two_modalities();
  ImageOptions o = sounds();
  o.pixels = true;
  const std::string expected = "the codec of sound (frames) is not one of images: name a modality of images";
  EXPECT_EQ(message_of<UserError>([&] { generate_images(m, std::vector<std::string>{"x"}, o); }), expected);
  EXPECT_EQ(message_of<UserError>([&] { tokenize(m, {{"sound", "", "x.png", {}}}); }), expected);
  // Beside it pictures are what they were.
  EXPECT_TRUE(at::equal(generate_images(m, std::vector<std::string>{"red heart"})[0].ids_L,
                        generate_images(tiny_graft(), std::vector<std::string>{"red heart"})[0].ids_L));
}

}  // namespace
}  // namespace moegraft::generate
