#include <gtest/gtest.h>

#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"

namespace moegraft {
namespace {

TEST(Check, CarriesTheMessageAndTheKind) {
  int rank = 0;
  try {
    MOEGRAFT_CHECK_USAGE(rank >= 1, "adapters[0].rank must be in [1, 1024], got ", rank);
    FAIL();
  } catch (const UsageError& e) {
    EXPECT_STREQ(e.what(), "adapters[0].rank must be in [1, 1024], got 0");
  }
  EXPECT_THROW(MOEGRAFT_INVARIANT(rank == 1, "rank"), InvariantError);
  EXPECT_NO_THROW(MOEGRAFT_CHECK(rank == 0, "no"));
}

TEST(Rng, PhiloxKnownAnswer) {
  // Random123's kat_vectors: philox4x32-10 with key 0 and counter 0. Purpose hashing is xored into the key, so undo it by constructing
  // a stream and comparing two equal ones, and check the statistical basics instead of the raw key schedule.
  Rng a(17, "data", 3), b(17, "data", 3), c(17, "data", 4), d(18, "data", 3), e(17, "sample", 3);
  const uint64_t first = a.next_u64();
  EXPECT_EQ(first, b.next_u64());
  EXPECT_NE(first, c.next_u64());
  EXPECT_NE(first, d.next_u64());
  EXPECT_NE(first, e.next_u64());
}

TEST(Rng, MomentsAndRange) {
  Rng rng(1, "moments");
  double sum = 0, squares = 0, uniform = 0;
  const int n = 200000;
  for (int i = 0; i < n; ++i) {
    const double x = rng.normal();
    sum += x;
    squares += x * x;
    uniform += rng.uniform();
  }
  EXPECT_NEAR(sum / n, 0, 0.01);      // 4.5 standard errors
  EXPECT_NEAR(squares / n, 1, 0.015);
  EXPECT_NEAR(uniform / n, 0.5, 0.003);
  for (int i = 0; i < 1000; ++i) EXPECT_LT(rng.below(7), 7u);
}

TEST(Rng, PermutationHoldsEachIndexOnce) {
  auto order = Rng(5, "p").permutation(1000);
  EXPECT_EQ(std::set<int64_t>(order.begin(), order.end()).size(), 1000u);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
}

TEST(Text, NearestWord) {
  EXPECT_EQ(nearest_word("warm_up", {"warmup", "steps", "lr"}), "warmup");
  EXPECT_EQ(nearest_word("zzzzzz", {"warmup", "steps", "lr"}), "");
}

TEST(Text, SplitJoinTrim) {
  EXPECT_EQ(join(split("a.b..c", '.'), "|"), "a|b||c");
  EXPECT_EQ(trim("  x y \n"), "x y");
}

TEST(Progress, Formats) {
  EXPECT_EQ(format_seconds(3723), "1:02:03");
  EXPECT_EQ(format_seconds(65.4), "1:05");
  EXPECT_EQ(format_count(4730000), "4.73 M");
}

}  // namespace
}  // namespace moegraft
