// Likelihood ranking, and the baselines of retrieval.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/data/sequence.h"
#include "moegraft/evaluate/baselines.h"
#include "moegraft/evaluate/captions.h"
#include "moegraft/evaluate/evaluation.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/evaluate/likelihood_ranking.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "support/tiny_world.h"

namespace moegraft::evaluate {
namespace {

namespace fs = std::filesystem;

class Understanding : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new testing::TemporaryFolder("moegraft-understanding");
    world_ = new testing::TinyWorld(testing::make_tiny_world(folder_->path() / "world"));
    testing::write_run(*world_, 0.5);
    model_ = new graft::GraftedModel(graft::open_model(world_->run));
  }
  static void TearDownTestSuite() {
    delete model_;
    delete world_;
    delete folder_;
  }
  static const model::ModalityTokens& tokens() { return model_->vocabulary.modalities[0]; }
  static RankingSection ranking(int64_t n, int64_t candidates) {
    RankingSection s;
    s.name = "all", s.manifest = world_->manifest.string(), s.n = n, s.candidates = candidates;
    return s;
  }
  static RetrievalSection retrieval(const std::string& name, const fs::path& manifest) {
    RetrievalSection r;
    r.name = name, r.manifest = manifest.string(), r.n = 16;
    return r;
  }

  static testing::TemporaryFolder* folder_;
  static testing::TinyWorld* world_;
  static graft::GraftedModel* model_;
};
testing::TemporaryFolder* Understanding::folder_ = nullptr;
testing::TinyWorld* Understanding::world_ = nullptr;
graft::GraftedModel* Understanding::model_ = nullptr;

// Every pair's likelihood from the shards, as training lays them out, one by one.
TEST_F(Understanding, RanksAgreeWithEveryPairComputedAlone) {
  const auto items = read_captioned_items(world_->image_shards.string(), model_->vocabulary, tokens(), 100);
  const int64_t n = int64_t(items.size());
  const auto nll = [&](const CaptionedItem* caption, const CaptionedItem& picture) {
    std::vector<data::Segment> segments;
    if (caption) segments.push_back({0, caption->before});
    segments.push_back({tokens().modality, picture.codes});
    return sequence_nll(*model_, tokens(), {data::assemble(segments, model_->vocabulary, world_->config.data)})[0];
  };
  std::vector<std::vector<double>> by_caption(items.size(), std::vector<double>(items.size()));
  std::vector<double> alone;
  double diagonal = 0;
  for (int64_t p = 0; p < n; ++p) {
    for (int64_t c = 0; c < n; ++c) by_caption[c][p] = nll(&items[c], items[p]);
    alone.push_back(nll(nullptr, items[p]));
    diagonal += by_caption[p][p];
  }
  const CaptionUse use = measure_captions(*model_, tokens(), items, world_->config.data, 3);
  EXPECT_NEAR(use.nll_true * double(use.labels), diagonal, 1e-3);

  const auto rank = [&](int64_t i, const std::function<double(int64_t)>& cost) {
    int64_t rank = 1;
    for (int64_t k = 0; k < n; ++k) rank += items[k].codes != items[i].codes && cost(k) <= cost(i);
    return rank;
  };
  const LikelihoodRanking all = rank_likelihoods(*model_, tokens(), ranking(100, 100));
  ASSERT_EQ(all.prompt_N.size(), items.size());
  bool differ = false;
  for (size_t k = 0; k < items.size(); ++k) {
    const int64_t i = all.prompt_N[k];
    EXPECT_EQ(all.captions->rank_N[k], rank(i, [&](int64_t c) { return by_caption[c][i]; })) << i;
    EXPECT_EQ(all.pictures->rank_N[k], rank(i, [&](int64_t p) { return by_caption[i][p]; })) << i;
    EXPECT_EQ(all.pictures_pmi->rank_N[k], rank(i, [&](int64_t p) { return by_caption[i][p] - alone[p]; })) << i;
    differ |=
        all.pictures->rank_N[k] != all.pictures_pmi->rank_N[k] && all.pictures->rank_N[k] != all.captions->rank_N[k];
  }
  EXPECT_TRUE(differ);  // the three are not one

  auto few = ranking(5, 4);
  few.direction = "image_to_caption";
  const LikelihoodRanking some = rank_likelihoods(*model_, tokens(), few);
  EXPECT_EQ(some.candidates_N, std::vector<int64_t>(5, 4));
  EXPECT_DOUBLE_EQ(some.chance(1), 0.25);
  EXPECT_DOUBLE_EQ(some.chance(10), 1);
  EXPECT_TRUE(some.captions && !some.pictures && !some.pictures_pmi);
  EXPECT_LE(*std::max_element(some.captions->rank_N.begin(), some.captions->rank_N.end()), 4);
}

// Nothing to tell captions apart by: the right one comes last of its equals.
TEST_F(Understanding, TiesCountAgainst) {
  graft::GraftedModel m = graft::open_model(world_->run);
  const at::NoGradGuard no_grad;
  for (const auto& p : m.registry->all())
    if (p.group == "embeddings") p.tensor.zero_();
  const LikelihoodRanking r = rank_likelihoods(m, tokens(), ranking(3, 5));
  for (const auto* ranking : {&r.captions, &r.pictures, &r.pictures_pmi}) EXPECT_EQ((*ranking)->rank_N, r.candidates_N);
}

TEST(Baselines, WordsOfACaption) {
  using Words = std::vector<std::string>;
  EXPECT_EQ(words_of("A Red-heart, 2nd!"), (Words{"a", "red", "heart", "2nd"}));
  EXPECT_EQ(words_of("  Stra\xc3\x9f"
                     "e \xe2\x9d\xa4 "),
            (Words{"stra\xc3\x9f"
                   "e",
                   "\xe2\x9d\xa4"}));
  EXPECT_EQ(words_of("-- "), Words{});
}

// Colours and shapes add up well enough in pixels: the bag of words finds pictures by their words in any order, and
// pictures it never saw.
TEST_F(Understanding, TheBagOfWordsFindsPicturesItHasNotSeen) {
  std::string seen, unseen;
  for (const char* colour : {"red", "green", "blue", "black"})
    for (const char* shape : {"disc", "bar", "cross", "frame"}) {
      const bool held_out = std::string(colour) == "blue" && std::string(shape) == "bar";
      const std::string image = (world_->dir / "images" / (std::string(colour) + "-" + shape + ".png")).string();
      (held_out ? unseen : seen) += io::Json{{"image", image},
                                             {"text", std::string("a ") + colour + " " + shape},
                                             {"captions", {std::string(shape) + ": " + colour}}}
                                        .dump() +
                                    "\n";
    }
  io::write_file_atomic(folder_->path() / "seen.jsonl", seen);
  io::write_file_atomic(folder_->path() / "unseen.jsonl", unseen);
  BaselineSection section;
  section.manifest = (folder_->path() / "seen.jsonl").string();
  auto unseen_task = retrieval("unseen", folder_->path() / "unseen.jsonl");
  unseen_task.candidates = section.manifest;
  // Not a word of it is known.
  io::write_file_atomic(
      folder_->path() / "foreign.jsonl",
      io::Json{{"image", (world_->dir / "images/red-bar.png").string()}, {"text", "xyz"}}.dump() + "\n");
  auto foreign = retrieval("foreign", folder_->path() / "foreign.jsonl");
  foreign.candidates = section.manifest;
  const Baselines b =
      measure_baselines(*model_, tokens(), section, {retrieval("seen", section.manifest), unseen_task, foreign});
  EXPECT_EQ(b.pictures, 15);
  EXPECT_EQ(b.captions, 30);
  EXPECT_EQ(b.bag_of_words.features, 9);  // "a", four colours, four shapes
  EXPECT_EQ(b.candidates.at("seen"), 15);
  EXPECT_EQ(b.candidates.at("unseen"), 16);
  EXPECT_GE(b.bag_of_words.rankings.at("seen").top(1), 0.6);
  EXPECT_EQ(b.bag_of_words.rankings.at("unseen").rank_N[0], 1);
  EXPECT_GE(b.bag_of_words.rankings.at("foreign").rank_N[0], 1);
  ASSERT_TRUE(b.base_states.has_value());
  EXPECT_EQ(b.base_states->features, 2 * 32);
  EXPECT_GT(b.base_states->rankings.at("seen").top(1), 0.2);  // of a random base; chance is 1/15
  EXPECT_LT(b.bag_of_words.held_out_error, 0.2);
}

TEST_F(Understanding, TheSectionsInOneEvaluation) {
  EvalConfig config;
  config.retrieval = {retrieval("all", world_->manifest)};
  config.retrieval[0].n = 2;
  config.baselines.emplace().manifest = world_->manifest.string();
  config.ranking = {ranking(4, 4)};
  std::string table;
  const auto j =
      io::Json::parse(evaluate_model(world_->run, config, {{}, [&](const std::string& rows) { table += rows; }}));
  const auto& task = j["baselines"]["tasks"]["all"];
  for (const char* key : {"bag_of_words", "base_states"}) EXPECT_TRUE(task[key].contains("top10")) << key;
  EXPECT_EQ(task["n"], 2);
  EXPECT_DOUBLE_EQ(task["chance"]["top1"].get<double>(), 1.0 / 16);
  for (const char* key : {"image_to_caption", "caption_to_image", "caption_to_image_pmi"})
    EXPECT_TRUE(j["ranking"]["all"][key].contains("mean_rank")) << key;
  EXPECT_EQ(j["ranking"]["all"]["candidates"], 4);
  for (const char* row :
       {"bag of words top-1, all", "base states top-1, all", "likeliest caption, all", "likeliest picture, all"})
    EXPECT_NE(table.find(row), std::string::npos) << row << " in\n" << table;
}

TEST_F(Understanding, BadInputIsRefused) {
  const auto parse = [](const std::string& yaml) -> std::string {
    try {
      config::parse<EvalConfig>(config::Document::from_string(yaml));
    } catch (const UsageError& e) { return e.what(); }
    return "no error";
  };
  EXPECT_NE(parse("baselines: { manifest: x }\n").find("`retrieval`"), std::string::npos);
  EXPECT_NE(parse("ranking: [{ name: a, manifest: x, candidates: 1 }]\n").find("ranking[0].candidates"),
            std::string::npos);
  EXPECT_NE(parse("ranking: [{ name: a, manifest: x, direction: up }]\n").find("image_to_caption"), std::string::npos);
  EXPECT_NE(
      parse("ranking: [{ name: a, manifest: x }, { name: a, manifest: y }]\n").find("ranking[1].name must differ"),
      std::string::npos);
  // One picture under two names: nothing to choose among.
  const std::string image = (world_->dir / "images/red-disc.png").string();
  io::write_file_atomic(folder_->path() / "one.jsonl", io::Json{{"image", image}, {"text", "a"}}.dump() + "\n" +
                                                           io::Json{{"image", image}, {"text", "b"}}.dump() + "\n");
  auto section = ranking(2, 2);
  section.manifest = (folder_->path() / "one.jsonl").string();
  try {
    rank_likelihoods(*model_, tokens(), section);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_NE(std::string(e.what()).find("nothing to choose among"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace moegraft::evaluate
