#include "moegraft/generate/images.h"

#include <gtest/gtest.h>

#include <set>
#include <unistd.h>

#include "fixture.h"
#include "generate/decode.h"
#include "moegraft/io/image.h"

namespace moegraft::generate {
namespace {

using namespace testing;

ImageOptions greedy(double cfg = 1.0) {
  ImageOptions o;
  o.sampling.temperature = 0;
  o.cfg = cfg;
  return o;
}

TEST(GenerateImages, CachedStepsEqualTheFullForward) {
  const auto m = tiny_graft();
  const at::NoGradGuard no_grad;
  PromptTokens short_prompt = tokenize(m, text_prompt("cat")),
               long_prompt = tokenize(m, text_prompt("a longer prompt"));
  for (auto* p : {&short_prompt, &long_prompt}) p->ids.push_back(kText), p->modality.push_back(1);
  const Prefix a = prefill(m, short_prompt), b = prefill(m, long_prompt);
  model::KvCache cache(m.decoder->spec(), 2, 40, at::kFloat, at::kCPU);
  cache.copy_sequence(0, b.cache, 0);  // two sequences of different length in one step
  cache.copy_sequence(1, a.cache, 0);
  Steps step(m, cache, 2, 1, [](const at::Tensor& hidden) { return hidden; }, DecodeSteps::plain);
  for (const int64_t code : {3, 15, 0, 7}) {
    for (auto* p : {&short_prompt, &long_prompt}) p->ids.push_back(kText + 2 + code), p->modality.push_back(1);
    const at::Tensor logits =
        m.decoder->modality_logits(step({kText + 2 + code, kText + 2 + code}), 0).narrow(1, 2, kCodes);
    EXPECT_LE((logits[0] - full_code_logits(m, long_prompt)[-1]).abs().max().item<float>(), 1e-5);
    EXPECT_LE((logits[1] - full_code_logits(m, short_prompt)[-1]).abs().max().item<float>(), 1e-5);
    EXPECT_GT((logits[1] - logits[0]).abs().max().item<float>(), 1e-3);
  }
}

TEST(GenerateImages, StepsForRecordingDrawTheSamePictures) {
  const auto m = tiny_graft();
  ImageOptions o = greedy(2.0);
  o.n = 3;
  o.max_batch = 2;  // the last pictures are fewer: a step of another size
  const auto expected = generate_images(m, std::vector<std::string>{"red heart", "a much longer prompt", "x"}, o);
  o.steps = DecodeSteps::fixed;
  const auto results = generate_images(m, std::vector<std::string>{"red heart", "a much longer prompt", "x"}, o);
  ASSERT_EQ(results.size(), expected.size());
  for (size_t i = 0; i < results.size(); ++i)
    EXPECT_TRUE(at::equal(results[i].ids_L, expected[i].ids_L)) << "picture " << i;
  o.steps = DecodeSteps::recorded;
  const std::string error = message_of<UsageError>([&] { generate_images(m, std::vector<std::string>{"x"}, o); });
  EXPECT_NE(error.find("the model is on cpu; leave --cuda-graphs out"), std::string::npos) << error;
}

TEST(GenerateImages, DecodesInFixedStepsOnAGpuUnlessToldOtherwise) {
  EXPECT_EQ(ImageOptions().steps, DecodeSteps::automatic);
  EXPECT_EQ(decode_steps(DecodeSteps::automatic, at::kCPU), DecodeSteps::plain);
  EXPECT_EQ(decode_steps(DecodeSteps::automatic, at::Device(at::kCUDA, 0)), DecodeSteps::fixed);
  for (const auto asked : {DecodeSteps::plain, DecodeSteps::fixed, DecodeSteps::recorded})
    for (const at::Device device : {at::Device(at::kCPU), at::Device(at::kCUDA, 0)})
      EXPECT_EQ(decode_steps(asked, device), asked);
}

TEST(GenerateImages, GreedyPicksTheBestCodeOfTheFullForward) {
  const auto m = tiny_graft();
  const auto results = generate_images(m, std::vector<std::string>{"red heart", "dog"}, greedy());
  ASSERT_EQ(results.size(), 2u);
  for (size_t p = 0; p < 2; ++p) {
    const PromptTokens prompt = tokenize(m, text_prompt(p ? "dog" : "red heart"));
    const at::Tensor logits =
        full_code_logits(m, append_picture(prompt, results[p].ids_L)).narrow(0, prompt.size(), kLength);
    EXPECT_TRUE(at::equal(logits.argmax(1), results[p].ids_L));
    EXPECT_EQ(results[p].prompt, int64_t(p));
    EXPECT_TRUE(at::equal(results[p].pixels_3HW,
                          graft::find_image_codec(m, "image")->decode(results[p].ids_L.unsqueeze(0))[0]));
  }
  EXPECT_FALSE(at::equal(results[0].ids_L, results[1].ids_L));
}

TEST(GenerateImages, GuidanceMovesLogitsAwayFromTheUnconditionalOnes) {
  const auto m = tiny_graft();
  const auto plain = generate_images(m, std::vector<std::string>{"red heart"}, greedy());
  bool differs = false;
  for (const double cfg : {0.0, 3.0, 7.0}) {
    const auto got = generate_images(m, std::vector<std::string>{"red heart"}, greedy(cfg));
    const PromptTokens prompt = tokenize(m, text_prompt("red heart")), dropped = unconditional(m);
    ASSERT_EQ(dropped.ids, std::vector<int64_t>{kBos});
    const at::Tensor cond = full_code_logits(m, append_picture(prompt, got[0].ids_L)).narrow(0, prompt.size(), kLength);
    const at::Tensor uncond =
        full_code_logits(m, append_picture(dropped, got[0].ids_L)).narrow(0, dropped.size(), kLength);
    EXPECT_TRUE(at::equal((uncond + cfg * (cond - uncond)).argmax(1), got[0].ids_L)) << cfg;
    differs |= !at::equal(got[0].ids_L, plain[0].ids_L);
  }
  EXPECT_TRUE(differs);
  // Without the condition, prompts do not matter.
  const auto none = generate_images(m, std::vector<std::string>{"red heart", "dog"}, greedy(0.0));
  EXPECT_TRUE(at::equal(none[0].ids_L, none[1].ids_L));
}

TEST(GenerateImages, APictureDependsOnNothingElseInTheCall) {
  const auto m = tiny_graft();
  for (const double cfg : {1.0, 2.5}) {
    ImageOptions o;
    o.cfg = cfg;
    o.seed = 4;
    o.n = 5;
    const auto all = generate_images(m, std::vector<std::string>{"red heart", "dog", "red heart"}, o);
    ASSERT_EQ(all.size(), 15u);
    for (size_t i = 0; i < 5; ++i) EXPECT_TRUE(at::equal(all[i].ids_L, all[10 + i].ids_L)) << "the same prompt again";
    EXPECT_FALSE(at::equal(all[0].ids_L, all[1].ids_L)) << "pictures of a prompt have streams of their own";
    for (const int64_t batch : {1, 2, 4, 64}) {
      o.max_batch = batch;
      o.n = 3;
      const auto some = generate_images(m, std::vector<std::string>{"dog"}, o);
      ASSERT_EQ(some.size(), 3u);
      for (size_t i = 0; i < 3; ++i)
        EXPECT_TRUE(at::equal(some[i].ids_L, all[5 + i].ids_L)) << "batch " << batch << ", picture " << i;
    }
    o.max_batch = 64;
    o.max_cache_bytes = 1;  // one picture at a time
    EXPECT_TRUE(at::equal(generate_images(m, std::vector<std::string>{"dog"}, o)[2].ids_L, all[7].ids_L));
    o.max_cache_bytes = 1 << 20;
    o.seed = 5;
    EXPECT_FALSE(at::equal(generate_images(m, std::vector<std::string>{"dog"}, o)[2].ids_L, all[7].ids_L));
  }
}

TEST(GenerateImages, DrawsCodesOnly) {
  auto m = tiny_graft();
  // Begin and end would win every draw: both heads are made large along every hidden state's direction of codes.
  const at::NoGradGuard no_grad;
  at::Tensor head = m.decoder->rows()[0].head_ND;
  head.narrow(0, 0, 2).copy_(head.narrow(0, 2, 2) * 1000);
  ImageOptions o;
  o.n = 20;
  o.sampling.temperature = 3;
  int64_t last_done = 0, last_total = 0;
  o.on_progress = [&](int64_t done, int64_t total) { last_done = done, last_total = total; };
  std::set<int64_t> seen;
  for (const auto& r : generate_images(m, std::vector<std::string>{"", "x"}, o)) {
    ASSERT_EQ(r.ids_L.sizes(), at::IntArrayRef({kLength}));
    ASSERT_EQ(r.ids_L.scalar_type(), at::kLong);
    for (int64_t i = 0; i < kLength; ++i) seen.insert(r.ids_L[i].item<int64_t>());
    EXPECT_EQ(r.pixels_3HW.sizes(), at::IntArrayRef({3, 6, 6}));
  }
  EXPECT_GE(*seen.begin(), 0);
  EXPECT_LT(*seen.rbegin(), kCodes);
  EXPECT_EQ(seen.size(), size_t(kCodes)) << "hot enough to meet every code, the first and the last too";
  EXPECT_EQ(last_done, 40 * kLength);
  EXPECT_EQ(last_total, 40 * kLength);
}

TEST(GenerateImages, RefusesBadCalls) {
  const auto m = tiny_graft();
  const std::vector<std::string> prompt{"dog"};
  EXPECT_THROW(generate_images(m, std::vector<std::string>{}), UsageError);
  ImageOptions o;
  o.n = 0;
  EXPECT_THROW(generate_images(m, prompt, o), UsageError);
  o = {};
  o.cfg = -1;
  EXPECT_THROW(generate_images(m, prompt, o), UsageError);
  o = {};
  o.sampling.temperature = -1;
  EXPECT_THROW(generate_images(m, prompt, o), UsageError);
  o = {};
  o.modality = "audio";
  EXPECT_NE(message_of<UsageError>([&] { generate_images(m, prompt, o); }).find("no modality \"audio\""),
            std::string::npos);
  const auto text_only = tiny_graft(false);
  EXPECT_NE(
      message_of<UsageError>([&] { generate_images(text_only, prompt); }).find("no modality \"image\" in models/tiny"),
      std::string::npos);
  // BOS + 53 bytes + begin, 9 codes and end are 65 of 64 positions; one byte less fits.
  EXPECT_NE(message_of<UserError>([&] {
              generate_images(m, std::vector<std::string>{std::string(53, 'x')});
            }).find("shorten the prompt by 1 tokens"),
            std::string::npos);
  EXPECT_EQ(generate_images(m, std::vector<std::string>{std::string(52, 'x')}).size(), 1u);
  auto no_codec = tiny_graft();
  no_codec.codecs.clear();
  EXPECT_NE(message_of<UserError>([&] { generate_images(no_codec, prompt); }).find("codec of image"),
            std::string::npos);
  o = {};
  o.pixels = false;
  EXPECT_FALSE(generate_images(no_codec, prompt, o)[0].pixels_3HW.defined());
  auto no_tokenizer = tiny_graft();
  no_tokenizer.tokenizer = nullptr;
  EXPECT_NE(message_of<UserError>([&] { generate_images(no_tokenizer, prompt); }).find("no tokenizer"),
            std::string::npos);
  auto narrow = tiny_graft();
  narrow.vocabulary.text_size = 100;  // 'd' is 103: it would be read as a code
  EXPECT_THROW(generate_images(narrow, prompt), UserError);
}

TEST(Prompt, ParsesPictures) {
  const auto m = tiny_graft();
  const Prompt p = parse_prompt("a cat <image:c a.png> in <b> the rain", m.vocabulary);
  ASSERT_EQ(p.size(), 3u);
  EXPECT_EQ(p[0].text, "a cat");
  EXPECT_EQ(p[1].modality, "image");
  EXPECT_EQ(p[1].image, "c a.png");
  EXPECT_EQ(p[2].text, "in <b> the rain");
  EXPECT_EQ(parse_prompt(" as <it: is> < x", m.vocabulary)[0].text, " as <it: is> < x");
  EXPECT_TRUE(parse_prompt("", m.vocabulary).empty());
  EXPECT_THROW(parse_prompt("<image:>", m.vocabulary), UsageError);
  EXPECT_THROW(parse_prompt("<image:a.png>", model::Vocabulary{kText, 1, 2, {}}), UsageError);
}

TEST(Prompt, PicturesBecomeCodesInPlace) {
  const auto m = tiny_graft();
  const at::Tensor codes = at::arange(1, 1 + kLength, at::kLong);
  const auto file = std::filesystem::temp_directory_path() / ("moegraft_prompt_" + std::to_string(::getpid()) + ".png");
  io::save_image(file, graft::find_image_codec(m, "image")->decode(codes.unsqueeze(0))[0]);
  const PromptTokens tokens = tokenize(m, parse_prompt("A<image:" + file.string() + ">B", m.vocabulary));
  std::filesystem::remove(file);
  std::vector<int64_t> ids{kBos, 3 + 'A', kText}, modality{0, 0};
  for (int64_t c = 1; c <= kLength; ++c) ids.push_back(kText + 2 + c);
  ids.push_back(kText + 1);
  ids.push_back(3 + 'B');
  modality.resize(ids.size() - 1, 1);
  modality.push_back(0);
  EXPECT_EQ(tokens.ids, ids);
  EXPECT_EQ(tokens.modality, modality);
  EXPECT_NE(message_of<UserError>([&] { tokenize(m, {{"image", "", file, {}}}); }).find(file.string()),
            std::string::npos);
  EXPECT_THROW(tokenize(m, {{"image", "", {}, codes.narrow(0, 0, 3)}}), UserError);
  EXPECT_THROW(tokenize(m, {{"image", "", {}, codes + kCodes}}), UserError);
}

TEST(Prompt, APictureInThePromptIsSeen) {
  const auto m = tiny_graft();
  const auto with = [](int64_t code) {
    return Prompt{{"", "after", {}, {}}, {"image", "", {}, at::full({kLength}, code, at::kLong)}, {"", "now", {}, {}}};
  };
  const auto drawn = generate_images(m, std::vector<Prompt>{with(1), with(9), with(1)}, greedy());
  EXPECT_TRUE(at::equal(drawn[0].ids_L, drawn[2].ids_L));
  EXPECT_FALSE(at::equal(drawn[0].ids_L, drawn[1].ids_L));
  const PromptTokens prompt = tokenize(m, with(9));
  EXPECT_TRUE(
      at::equal(full_code_logits(m, append_picture(prompt, drawn[1].ids_L)).narrow(0, prompt.size(), kLength).argmax(1),
                drawn[1].ids_L));
}

}  // namespace
}  // namespace moegraft::generate
