#include "moegraft/routing/stats.h"

#include <gtest/gtest.h>
#include "libtorch.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "moegraft/base/check.h"

namespace moegraft::routing {
namespace {

// Tokens that choose experts `ids` (top-1) with probability one.
struct Choice {
  at::Tensor probs_TE, ids_TK, weights_TK, modality_T;
};
Choice choose(const std::vector<int64_t>& experts, const std::vector<int64_t>& modalities, int64_t E) {
  Choice c;
  c.ids_TK = torch::tensor(experts, at::kLong).unsqueeze(1);
  c.probs_TE = at::one_hot(c.ids_TK.squeeze(1), E).to(at::kFloat);
  c.weights_TK = at::ones({int64_t(experts.size()), 1});
  c.modality_T = torch::tensor(modalities, at::kLong);
  return c;
}
void observe(RoutingStats& stats, int64_t layer, const Choice& c) {
  stats.observe(layer, c.probs_TE, c.ids_TK, c.weights_TK, c.modality_T);
}

TEST(Measures, ClosedForms) {
  EXPECT_DOUBLE_EQ(normalised_entropy({0.25, 0.25, 0.25, 0.25}), 1.0);
  EXPECT_DOUBLE_EQ(normalised_entropy({1, 0, 0, 0}), 0.0);
  EXPECT_DOUBLE_EQ(normalised_entropy({0.5, 0.5, 0, 0}), 0.5);
  EXPECT_DOUBLE_EQ(normalised_entropy({1}), 1.0);
  EXPECT_DOUBLE_EQ(jensen_shannon_bits({0.3, 0.7}, {0.3, 0.7}), 0.0);
  EXPECT_DOUBLE_EQ(jensen_shannon_bits({1, 0}, {0, 1}), 1.0);
  // p = (1, 0), q = (1/2, 1/2): m = (3/4, 1/4); 1/2 log2(4/3) + 1/4 log2(2/3) + 1/4 log2(2).
  EXPECT_NEAR(jensen_shannon_bits({1, 0}, {0.5, 0.5}), 0.5 * std::log2(4.0 / 3) + 0.25 * std::log2(2.0 / 3) + 0.25,
              1e-15);
  EXPECT_NEAR(mutual_information_bits({{2, 4}, {1, 2}}), 0.0, 1e-15) << "proportional rows say nothing of the modality";
  EXPECT_DOUBLE_EQ(mutual_information_bits({{5, 0}, {0, 5}}), 1.0);
  // 3 to 1 split of modalities, disjoint experts: the entropy of the split.
  EXPECT_NEAR(mutual_information_bits({{3, 0}, {0, 1}}), 0.75 * std::log2(4.0 / 3) + 0.25 * 2, 1e-15);
}

TEST(RoutingStats, IdenticalLoads) {
  RoutingStats stats(1, 4, {"text", "image"});
  observe(stats, 0, choose({0, 1, 2, 3, 0, 1, 2, 3}, {0, 0, 0, 0, 1, 1, 1, 1}, 4));
  const auto report = stats.read();
  ASSERT_EQ(report.layers.size(), 1u);
  const auto& layer = report.layers[0];
  EXPECT_DOUBLE_EQ(layer.divergence_M[1], 0.0);
  EXPECT_DOUBLE_EQ(layer.mutual_information, 0.0);
  EXPECT_DOUBLE_EQ(layer.modalities[1].entropy, 1.0);
  EXPECT_DOUBLE_EQ(layer.modalities[1].imbalance, 1.0);
  EXPECT_EQ(layer.modalities[1].dead, 0);
  EXPECT_EQ(layer.selectivity_E, (std::vector<std::string>(4, "agnostic")));
}

TEST(RoutingStats, DisjointLoads) {
  RoutingStats stats(2, 4, {"text", "image"});
  observe(stats, 1, choose({0, 0, 2, 2}, {0, 0, 1, 1}, 4));
  const auto report = stats.read();
  ASSERT_EQ(report.layers.size(), 1u) << "a layer that saw nothing (a dense one) is left out";
  const auto& layer = report.layers[0];
  EXPECT_EQ(layer.layer, 1);
  EXPECT_DOUBLE_EQ(layer.divergence_M[1], 1.0);
  EXPECT_DOUBLE_EQ(layer.mutual_information, 1.0);
  EXPECT_DOUBLE_EQ(layer.modalities[0].imbalance, 4.0);
  EXPECT_EQ(layer.modalities[0].dead, 3);
  EXPECT_DOUBLE_EQ(layer.modalities[0].entropy, 0.0);
  EXPECT_DOUBLE_EQ(layer.modalities[0].confidence, 1.0);
  EXPECT_DOUBLE_EQ(layer.modalities[0].router_entropy, 0.0);
  EXPECT_EQ(layer.selectivity_E, (std::vector<std::string>{"text", "dead", "image", "dead"}));
  EXPECT_DOUBLE_EQ(report.mean_divergence(1), 1.0);
}

TEST(RoutingStats, UniformProbabilitiesAndTopTwo) {
  RoutingStats stats(1, 4, {"text", "image"});
  const auto ids = torch::tensor({0, 1, 0, 2, 0, 3}, at::kLong).reshape({3, 2});
  auto probs = at::full({3, 4}, 0.25).set_requires_grad(true);
  stats.observe(0, probs * 1.0, ids, at::full({3, 2}, 0.5), at::Tensor());  // no modalities: all text
  const auto report = stats.read();
  const auto& text = report.layers[0].modalities[0];
  EXPECT_EQ(text.tokens, 3);
  EXPECT_NEAR(text.router_entropy, 1.0, 1e-7);
  EXPECT_DOUBLE_EQ(text.confidence, 0.0);
  EXPECT_DOUBLE_EQ(text.load_E[0], 0.5);
  EXPECT_DOUBLE_EQ(text.load_E[3], 1.0 / 6);
  EXPECT_DOUBLE_EQ(text.probability_E[2], 0.25);
  EXPECT_EQ(report.layers[0].modalities[1].tokens, 0);
  EXPECT_TRUE(std::isnan(report.layers[0].divergence_M[1]));
  EXPECT_TRUE(std::isnan(report.layers[0].mutual_information));
}

TEST(RoutingStats, CallsAddUpAndResetForgets) {
  at::manual_seed(2);
  const auto probs = torch::rand({50, 8}).softmax(1);
  const auto ids = std::get<1>(probs.topk(2, 1));
  const auto modality = torch::randint(0, 3, {50}, at::kLong);
  RoutingStats whole(1, 8, {"text", "image", "sound"}), parts(1, 8, {"text", "image", "sound"});
  whole.observe(0, probs, ids, ids, modality);
  parts.observe(0, probs.narrow(0, 0, 20), ids.narrow(0, 0, 20), ids, modality.narrow(0, 0, 20));
  parts.observe(0, probs.narrow(0, 20, 30), ids.narrow(0, 20, 30), ids, modality.narrow(0, 20, 30));
  EXPECT_LT((whole.sums() - parts.sums()).abs().max().item<double>(), 1e-5);  // float32 sums of 50 terms below 1 each
  const auto counts = whole.sums().narrow(2, 0, 8);
  EXPECT_DOUBLE_EQ(counts.sum().item<double>(), 100.0);
  for (int64_t m = 0; m < 3; ++m)
    for (int64_t e = 0; e < 8; ++e) {
      const auto expected = ((ids == e).any(1) & (modality == m)).sum().item<int64_t>();
      EXPECT_DOUBLE_EQ(counts[0][m][e].item<double>(), double(expected));
    }
  whole.reset();
  EXPECT_TRUE(whole.read().layers.empty());
}

TEST(RoutingStats, WrongShapesAreBugs) {
  RoutingStats stats(1, 4, {"text"});
  EXPECT_THROW(stats.observe(1, at::ones({2, 4}), at::zeros({2, 1}, at::kLong), {}, {}), InvariantError);
  EXPECT_THROW(stats.observe(0, at::ones({2, 5}), at::zeros({2, 1}, at::kLong), {}, {}), InvariantError);
  EXPECT_THROW(RoutingStats(1, 4, {"image"}), InvariantError);
  stats.observe(0, at::ones({0, 4}), at::zeros({0, 1}, at::kLong), {}, {});
  EXPECT_TRUE(stats.read().layers.empty());
}

TEST(Output, JsonLineAndScalars) {
  RoutingStats stats(2, 4, {"text", "image"});
  observe(stats, 0, choose({0, 0, 2, 2}, {0, 0, 1, 1}, 4));
  observe(stats, 1, choose({0, 1, 2}, {0, 0, 0}, 4));
  const auto line = to_json_line(stats.read(), 40);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const auto j = nlohmann::json::parse(line);
  EXPECT_EQ(j.at("step"), 40);
  EXPECT_EQ(j.at("layers").size(), 2u);
  EXPECT_EQ(j["layers"][0]["divergence_bits"]["image"], 1.0);
  EXPECT_TRUE(j["layers"][1]["divergence_bits"]["image"].is_null());
  EXPECT_EQ(j["layers"][0]["modalities"]["image"]["load"], nlohmann::json({0.0, 0.0, 1.0, 0.0}));
  EXPECT_EQ(j["layers"][1]["modalities"]["image"]["tokens"], 0);
  EXPECT_EQ(j["mean"]["divergence/image"], 1.0) << "the mean is over layers that have both";
  bool found = false;
  for (const auto& [tag, value] : scalars(stats.read())) {
    EXPECT_TRUE(std::isfinite(value)) << tag;
    found |= tag == "routing/divergence/image/layer_0" && value == 1.0;
  }
  EXPECT_TRUE(found);
}

TEST(Output, ALineReadsBack) {
  RoutingStats stats(2, 3, {"text", "audio", "image"});
  observe(stats, 0, choose({0, 0, 2, 1}, {0, 0, 1, 2}, 3));
  observe(stats, 1, choose({0, 1, 2}, {0, 0, 0}, 3));
  const auto written = stats.read();
  const auto read = parse_json_line(to_json_line(written, 40), "here");
  EXPECT_EQ(read.step, 40);
  EXPECT_EQ(read.report.modality_names, written.modality_names);
  EXPECT_EQ(read.report.num_experts, 3);
  ASSERT_EQ(read.report.layers.size(), 2u);
  // To six digits; NaN for NaN.
  const auto same = [](double a, double b) { return std::isnan(a) ? std::isnan(b) : std::abs(a - b) <= 5e-7; };
  for (size_t l = 0; l < 2; ++l) {
    const auto &a = written.layers[l], &b = read.report.layers[l];
    EXPECT_EQ(a.layer, b.layer);
    EXPECT_EQ(a.selectivity_E, b.selectivity_E);
    EXPECT_TRUE(same(a.mutual_information, b.mutual_information)) << l;
    for (size_t m = 0; m < 3; ++m) {
      const auto &x = a.modalities[m], &y = b.modalities[m];
      EXPECT_TRUE(x.tokens == y.tokens && x.dead == y.dead && x.load_E.size() == y.load_E.size() &&
                  x.probability_E.size() == y.probability_E.size())
          << l << " " << m;
      EXPECT_TRUE(same(a.divergence_M[m], b.divergence_M[m]) && same(x.entropy, y.entropy) &&
                  same(x.imbalance, y.imbalance) && same(x.router_entropy, y.router_entropy) &&
                  same(x.confidence, y.confidence))
          << l << " " << m;
      for (size_t e = 0; e < x.load_E.size(); ++e)
        EXPECT_TRUE(same(x.load_E[e], y.load_E[e]) && same(x.probability_E[e], y.probability_E[e]))
            << l << " " << m << " " << e;
    }
  }
  EXPECT_TRUE(heat_map(read.report, 4).equal(heat_map(written, 4)));
  const auto dense = parse_json_line(to_json_line({{"text", "image"}, 4, {}}, 1), "here");
  EXPECT_TRUE(dense.report.layers.empty());
}

TEST(Output, ALineThatDoesNotReadNamesItsPlace) {
  const std::string layer =
      R"({"layer":0,"modalities":{"text":{"tokens":2,"load":[1.0],"probability":[1.0],"entropy":0.0,"imbalance":2.0,"dead":1,"router_entropy":0.0,"confidence":1.0}},)"
      R"("divergence_bits":{},"mutual_information_bits":null,"selectivity":["text","dead"]})";
  struct Case {
    std::string line, message;
  };
  for (const auto& c :
       {Case{"{\"step\":1", "here: does not read"}, Case{R"({"step":1,"layers":[]})", "num_experts"},
        Case{R"({"step":1,"num_experts":2,"layers":[{"layer":0}]})", "here: "},
        Case{R"({"step":1,"num_experts":2,"layers":[)" + layer + "]}", "here: a layer lists 1 experts, expected 2"}}) {
    try {
      parse_json_line(c.line, "here");
      ADD_FAILURE() << c.line;
    } catch (const UserError& e) { EXPECT_NE(std::string(e.what()).find(c.message), std::string::npos) << e.what(); }
  }
}

TEST(Output, HeatMap) {
  RoutingStats stats(2, 3, {"text", "image"});
  observe(stats, 0, choose({0, 0, 2}, {0, 0, 1}, 3));
  observe(stats, 1, choose({1, 0}, {0, 0}, 3));
  const auto picture = heat_map(stats.read(), 4);
  EXPECT_EQ(picture.sizes(), (std::vector<int64_t>{3, 2 * 4, 2 * 3 * 4 + 4}));
  const auto at = [&](int64_t y, int64_t x) {
    return std::array<uint8_t, 3>{picture[0][y][x].item<uint8_t>(), picture[1][y][x].item<uint8_t>(),
                                  picture[2][y][x].item<uint8_t>()};
  };
  EXPECT_EQ(at(0, 0), colour(1.0)) << "text, layer 0, expert 0 takes all";
  EXPECT_EQ(at(0, 4), colour(0.0));
  EXPECT_EQ(at(7, 3), colour(0.5)) << "text, layer 1, expert 0 takes half";
  EXPECT_EQ(at(0, 13), (std::array<uint8_t, 3>{255, 255, 255})) << "between the panels";
  EXPECT_EQ(at(0, 16 + 8), colour(1.0)) << "image, layer 0, expert 2";
  EXPECT_EQ(at(4, 16), (std::array<uint8_t, 3>{255, 255, 255})) << "no image token in layer 1";
  double before = -1;
  for (int i = 0; i <= 100; ++i) {  // brightness rises
    const auto c = colour(i / 100.0);
    const double luma = 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
    EXPECT_GE(luma, before - 0.5);
    before = luma;
  }
}

}  // namespace
}  // namespace moegraft::routing
