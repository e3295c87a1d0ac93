#include "moegraft/generate/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "../support/paths.h"
#include "moegraft/base/check.h"

namespace moegraft::generate {
namespace {

const std::vector<float> kLogits{std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};
constexpr float kInf = std::numeric_limits<float>::infinity();

void expect_near(const std::vector<double>& got, const std::vector<double>& want, double tolerance = 1e-6) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_NEAR(got[i], want[i], tolerance) << i;
    EXPECT_EQ(got[i] == 0, want[i] == 0) << i << ": filtered or not";
  }
}

TEST(Sampling, ClosedForm) {
  expect_near(probabilities(kLogits, {}), {0.1, 0.4, 0.2, 0.3});
  expect_near(probabilities(kLogits, {0.5, 0, 1.0}), {0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3});
  expect_near(probabilities(kLogits, {1.0, 2, 1.0}), {0, 4.0 / 7, 0, 3.0 / 7});
  expect_near(probabilities(kLogits, {1.0, 0, 0.65}), {0, 4.0 / 7, 0, 3.0 / 7});        // .4 + .3 reaches .65
  expect_near(probabilities(kLogits, {1.0, 0, 0.75}), {0, 4.0 / 9, 2.0 / 9, 3.0 / 9});  // .7 does not reach .75
  expect_near(probabilities(kLogits, {1.0, 0, 0.01}), {0, 1, 0, 0});                    // the best always stays
  expect_near(probabilities(kLogits, {1.0, 3, 0.7}),
              {0, 4.0 / 7, 0, 3.0 / 7});  // the mass is of what top-k left: 4/9 + 3/9 = .78
  expect_near(probabilities(kLogits, {0.0, 0, 1.0}), {0, 1, 0, 0});
  expect_near(probabilities(std::vector<float>{1, 1, 0}, {1.0, 1, 1.0}), {0.5, 0.5, 0});  // equal to the k-th: kept
  expect_near(probabilities(std::vector<float>{0, -kInf}, {}), {1, 0});
  expect_near(probabilities(std::vector<float>{300, 299}, {1e-4, 0, 0.9999}), {1, 0});  // no overflow
}

TEST(Sampling, EqualsTransformers) {
  std::ifstream in(test_source_dir() + "/tests/golden/generate/sampling.txt");
  ASSERT_TRUE(in);
  SamplingOptions options;
  int cases = 0;
  for (size_t size; in >> options.temperature >> options.top_k >> options.top_p >> size; ++cases) {
    std::vector<float> logits(size);
    std::vector<double> want(size);
    for (auto& v : logits) in >> v;
    for (auto& v : want) in >> v;
    SCOPED_TRACE(cases);
    expect_near(probabilities(logits, options), want,
                2e-6);  // float32 division by the temperature on scores up to 10 / 0.1
  }
  EXPECT_EQ(cases, 10);
}

TEST(Sampling, DrawsWithTheseProbabilities) {
  std::vector<int64_t> counts(4);
  Rng rng(3, "test");
  for (int i = 0; i < 20000; ++i) ++counts[sample(kLogits, {}, rng)];
  const double want[] = {0.1, 0.4, 0.2, 0.3};
  for (int i = 0; i < 4; ++i)
    EXPECT_NEAR(counts[i] / 20000.0, want[i], 4 * std::sqrt(want[i] * (1 - want[i]) / 20000)) << i;
  for (int i = 0; i < 200; ++i) EXPECT_NE(sample(kLogits, {1.0, 2, 1.0}, rng) % 2, 0);  // ids 1 and 3 only
}

TEST(Sampling, IsAFunctionOfItsStream) {
  Rng a(3, "test", 1), b(3, "test", 1), c(3, "test", 2);
  std::vector<int64_t> x, y, z;
  for (int i = 0; i < 50; ++i)
    x.push_back(sample(kLogits, {}, a)), y.push_back(sample(kLogits, {}, b)), z.push_back(sample(kLogits, {}, c));
  EXPECT_EQ(x, y);
  EXPECT_NE(x, z);
}

TEST(Sampling, GreedyTakesTheFirstOfEquals) {
  Rng rng(1, "test");
  EXPECT_EQ(sample(std::vector<float>{0, 2, 2, 1}, {0.0, 0, 1.0}, rng), 1);
  EXPECT_EQ(rng.next_u64(), Rng(1, "test").next_u64()) << "greedy draws nothing";
}

TEST(Sampling, RefusesBadInput) {
  Rng rng(1, "test");
  for (const SamplingOptions& bad : {SamplingOptions{-0.1, 0, 1.0},
                                     {std::nan(""), 0, 1.0},
                                     {1.0, -1, 1.0},
                                     {1.0, 0, 0.0},
                                     {1.0, 0, 1.5},
                                     {1.0, 0, std::nan("")}}) {
    EXPECT_THROW(bad.validate(), UsageError);
    EXPECT_THROW(probabilities(kLogits, bad), UsageError);
  }
  for (double temperature : {0.0, 1.0}) {
    const SamplingOptions options{temperature, 0, 1.0};
    EXPECT_THROW(sample(std::vector<float>{0, std::nanf("")}, options, rng), UserError);
    EXPECT_THROW(sample(std::vector<float>{0, kInf}, options, rng), UserError);
    EXPECT_THROW(sample(std::vector<float>{-kInf, -kInf}, options, rng), UserError);
    EXPECT_THROW(sample(std::vector<float>{}, options, rng), UserError);
  }
}

}  // namespace
}  // namespace moegraft::generate
