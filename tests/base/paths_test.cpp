// A test program finds its files where it was built, or where the environment says.
#include <gtest/gtest.h>

#include <filesystem>

#include "../support/paths.h"

namespace moegraft {
namespace {

TEST(Paths, TheEnvironmentGoesFirst) {
  ASSERT_EQ(::setenv("MOEGRAFT_TESTS_PATH", "/elsewhere", 1), 0);
  EXPECT_EQ(path_from_environment("MOEGRAFT_TESTS_PATH", "/here"), "/elsewhere");
  ASSERT_EQ(::setenv("MOEGRAFT_TESTS_PATH", "", 1), 0);
  EXPECT_EQ(path_from_environment("MOEGRAFT_TESTS_PATH", "/here"), "/here");
  ASSERT_EQ(::unsetenv("MOEGRAFT_TESTS_PATH"), 0);
  EXPECT_EQ(path_from_environment("MOEGRAFT_TESTS_PATH", "/here"), "/here");
  EXPECT_TRUE(std::filesystem::exists(test_source_dir() + "/tests/golden")) << test_source_dir();
}

}  // namespace
}  // namespace moegraft
