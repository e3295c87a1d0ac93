#include "moegraft/generate/text.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "fixture.h"
#include "moegraft/io/json.h"
#include "support/tiny_world.h"

namespace moegraft::generate {
namespace {

using namespace testing;

TextOptions greedy(int64_t max_tokens) {
  TextOptions o;
  o.max_tokens = max_tokens;
  o.sampling.temperature = 0;
  return o;
}

at::Tensor full_text_logits(const graft::GraftedModel& m, const PromptTokens& tokens) {
  const at::NoGradGuard no_grad;
  model::PackedBatch batch;
  batch.ids_T = at::tensor(at::ArrayRef<int64_t>(tokens.ids), at::kLong);
  batch.modality_T = at::tensor(at::ArrayRef<int64_t>(tokens.modality), at::kLong);
  batch.positions_T = at::arange(tokens.size(), at::kLong);
  batch.cu_seqlens = {0, tokens.size()};
  return m.decoder->text_logits(m.decoder->forward(batch).hidden_TD);
}

// EOS gets the logit 0, which is never the largest of hundreds of random ones.
void silence_eos(graft::GraftedModel& m) {
  const at::NoGradGuard no_grad;
  m.decoder->base().weights->head_VD().tensor()[kEos].zero_();
}

TEST(GenerateText, GreedyEqualsTheFullForwardAfterTextAndAfterPictures) {
  auto m = tiny_graft();
  silence_eos(m);
  for (const bool picture : {false, true}) {
    Prompt prompt = text_prompt("hello");
    if (picture) prompt.push_back({"image", "", {}, at::full({kLength}, 3, at::kLong)});
    const auto result = generate_text(m, {prompt}, greedy(8)).at(0);
    ASSERT_EQ(result.ids.size(), 8u);
    EXPECT_FALSE(result.ended);
    PromptTokens tokens = tokenize(m, prompt);
    const int64_t first = tokens.size() - 1;
    tokens.ids.insert(tokens.ids.end(), result.ids.begin(), result.ids.end());
    tokens.modality.resize(tokens.ids.size(), 0);
    const at::Tensor best = full_text_logits(m, tokens).narrow(1, 0, 259).argmax(1);
    for (size_t i = 0; i < 8; ++i)
      EXPECT_EQ(best[first + int64_t(i)].item<int64_t>(), result.ids[i]) << picture << " " << i;
    EXPECT_EQ(result.text, m.tokenizer->decode(result.ids));
  }
}

TEST(GenerateText, NeverDrawsNewRowsOrPadding) {
  auto m = tiny_graft();
  const at::NoGradGuard no_grad;
  silence_eos(m);
  const_cast<at::Tensor&>(m.decoder->rows()[0].head_ND).mul_(1000);                      // pictures would win
  m.decoder->base().weights->head_VD().tensor().narrow(0, 259, kText - 259).mul_(1000);  // so would ids that the
                                                                                         // tokenizer lacks
  TextOptions o;
  o.max_tokens = 40;
  o.n = 3;
  std::vector<std::string> streamed(3);
  o.on_text = [&](int64_t, int64_t index, std::string_view text) { streamed[index] += text; };
  const auto results = generate_text(m, std::vector<std::string>{"x"}, o);
  ASSERT_EQ(results.size(), 3u);
  for (const auto& r : results) {
    for (const int64_t id : r.ids) EXPECT_TRUE(id >= 0 && id < 259) << id;
    EXPECT_EQ(streamed[r.index], r.text);
  }
  EXPECT_NE(results[0].ids, results[1].ids);
  o.n = 1;
  EXPECT_EQ(generate_text(m, std::vector<std::string>{"other", "x"}, o)[1].ids, results[0].ids)
      << "neither n nor other prompts change a continuation";
}

TEST(GenerateText, StopsAtEos) {
  auto m = tiny_graft();
  silence_eos(m);
  const auto open = generate_text(m, std::vector<std::string>{"x"}, greedy(6)).at(0);
  const at::NoGradGuard no_grad;
  // EOS takes over the head row of the fourth token drawn; EOS has the lower id and wins the tie.
  ASSERT_EQ(std::count(open.ids.begin(), open.ids.begin() + 3, open.ids[3]), 0);
  m.decoder->base().weights->head_VD().tensor()[kEos].copy_(m.decoder->base().weights->head_VD().tensor()[open.ids[3]]);
  const auto closed = generate_text(m, std::vector<std::string>{"x"}, greedy(6)).at(0);
  EXPECT_TRUE(closed.ended);
  EXPECT_EQ(closed.ids, std::vector<int64_t>(open.ids.begin(), open.ids.begin() + 3));
}

TEST(GenerateText, StopsAtEveryIdOfGenerationConfig) {
  auto m = tiny_graft();
  silence_eos(m);
  const auto open = generate_text(m, std::vector<std::string>{"x"}, greedy(6)).at(0);
  const moegraft::testing::TemporaryFolder base;
  m.base_path = base.path();
  io::write_json(base / "generation_config.json", {{"eos_token_id", {kEos, open.ids[3]}}});
  const auto closed = generate_text(m, std::vector<std::string>{"x"}, greedy(6)).at(0);
  EXPECT_TRUE(closed.ended);
  EXPECT_EQ(closed.ids,
            std::vector<int64_t>(open.ids.begin(), std::find(open.ids.begin(), open.ids.end(), open.ids[3])));
}

TEST(GenerateText, StreamsWholeCharacters) {
  auto m = tiny_graft();
  silence_eos(m);
  TextOptions o;
  o.max_tokens = 50;
  o.sampling.temperature = 5;
  std::string joined;
  int64_t pieces = 0;
  o.on_text = [&](int64_t, int64_t, std::string_view text) { joined += text, ++pieces; };
  const auto r = generate_text(m, std::vector<std::string>{"ab"}, o).at(0);
  EXPECT_EQ(joined, r.text);
  EXPECT_EQ(joined, m.tokenizer->decode(r.ids));
  EXPECT_LT(pieces, int64_t(r.ids.size())) << "some random bytes open a sequence and wait";
}

TEST(GenerateText, RefusesBadCalls) {
  const auto m = tiny_graft(false);
  const std::vector<std::string> prompt{"x"};
  EXPECT_THROW(generate_text(m, std::vector<std::string>{}), UsageError);
  EXPECT_THROW(generate_text(m, prompt, greedy(0)), UsageError);
  TextOptions o = greedy(4);
  o.sampling.top_p = 0;
  EXPECT_THROW(generate_text(m, prompt, o), UsageError);
  EXPECT_NE(message_of<UserError>([&] { generate_text(m, prompt, greedy(63)); }).find("lower --max-tokens"),
            std::string::npos);
  EXPECT_LE(generate_text(m, prompt, greedy(62)).at(0).ids.size(), 62u);
  auto mute = tiny_graft(false);
  mute.tokenizer = nullptr;
  EXPECT_THROW(generate_text(mute, prompt), UserError);
  auto no_bos = tiny_graft(false);
  no_bos.vocabulary.bos_id = -1;
  EXPECT_NE(message_of<UserError>([&] {
              generate_text(no_bos, std::vector<std::string>{""}, greedy(4));
            }).find("nothing to continue"),
            std::string::npos);
}

}  // namespace
}  // namespace moegraft::generate
