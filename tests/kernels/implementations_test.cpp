// How an operation finds what computes it.
#include "kernels/implementations.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace moegraft::kernels {
namespace {

struct Implementation {
  bool (*serves)(const int&);
  const char* (*run)();
};
constexpr Implementation kInOrder[]{
    {[](const int& x) { return x % 4 == 0; }, [] { return "fours"; }},
    {[](const int& x) { return x % 2 == 0; }, [] { return "twos"; }},
    {kAlways, [] { return "the rest"; }},
};

TEST(Implementations, TheFirstThatServesRunsAndTheLastServesWhatIsLeft) {
  std::vector<std::string> ran;
  for (const int x : {8, 6, 7}) ran.emplace_back(choose(kInOrder, x).run());
  EXPECT_EQ(ran, (std::vector<std::string>{"fours", "twos", "the rest"}));
}

TEST(Implementations, TheLastIsNotAsked) {
  static constexpr Implementation kOne[]{{kAlways, [] { return "the only one"; }}};
  EXPECT_STREQ(choose(kOne, 1).run(), "the only one");
}

}  // namespace
}  // namespace moegraft::kernels
