// moegraft upcycle with text: what a conversion costs is measured, and options that would be ignored are refused.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/convert/import_gguf.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;

class Upcycle : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<testing::TemporaryFolder>();
    convert::import_gguf(fs::path(test_source_dir()) / "tests/golden/convert/llama.gguf", dense(),
                         {.dtype = at::kFloat});
    std::string lines;
    for (int i = 0; i < 40; ++i) lines += "line " + std::to_string(i) + " of a text about hearts and stars\n";
    io::write_file_atomic(text(), lines);
  }
  static void TearDownTestSuite() { folder_.reset(); }
  static fs::path dense() { return *folder_ / "dense"; }
  static fs::path text() { return *folder_ / "text.txt"; }
  static fs::path out() { return *folder_ / "moe"; }
  static testing::ProcessResult upcycle(std::vector<std::string> options) {
    fs::remove_all(out());
    options.insert(options.begin(), {"upcycle", dense().string(), "-o", out().string()});
    return testing::run_moegraft(options);
  }
  static inline std::unique_ptr<testing::TemporaryFolder> folder_;
};

TEST_F(Upcycle, PerplexityBeforeAndAfterIsSaid) {
  struct Case {
    std::vector<std::string> options;
    bool keeps;
  };
  const Case cases[] = {
      {{"--method", "clone", "--router", "kmeans"}, true},
      {{"--method", "split", "--experts", "4", "--top-k", "1"}, false},
      {{"--method", "cluster", "--experts", "4", "--top-k", "1"}, false},
  };
  std::optional<double> dense;
  for (const Case& c : cases) {
    SCOPED_TRACE(c.options[1]);
    auto options = c.options;
    options.insert(options.end(), {"--text", text().string()});
    const auto said = upcycle(options);
    ASSERT_EQ(said.code, 0) << said.err;
    EXPECT_NE(said.err.find(c.options[1] + ": perplexity "), std::string::npos) << said.err;
    EXPECT_EQ(said.err.find("this method loses text ability; a run to recover it: configs/recovery.yaml") !=
                  std::string::npos,
              !c.keeps)
        << said.err;
    options.emplace_back("--json");
    const auto r = upcycle(options);
    const auto p = io::Json::parse(r.out).at("perplexity");
    const double before = p["dense"], after = p["upcycled"];
    EXPECT_EQ(dense.value_or(before), before);
    dense = before;
    if (c.keeps)
      EXPECT_NEAR(after, before, 1e-4 * before);
    else
      EXPECT_GT(std::abs(after - before), 1e-5 * before);  // of random weights
    EXPECT_GT(p["tokens"].get<int64_t>(), 100);
    for (const auto& entry : fs::directory_iterator(folder_->path()))
      EXPECT_FALSE(entry.path().filename().string().starts_with(".")) << entry.path() << " is left";
  }
}

TEST_F(Upcycle, OptionsThatWouldBeIgnoredAreRefused) {
  struct Case {
    std::vector<std::string> options;
    const char* line;
  };
  const Case cases[] = {
      {{"--experts", "8"}, "--experts is for --method clone or split or cluster, got --method virtual_groups"},
      {{"--method", "split", "--clones", "2"}, "--clones is for --method virtual_groups, got --method split"},
      {{"--method", "split", "--shared", "0.5"}, "--shared is for --method cluster, got --method split"},
      {{"--method", "cluster"}, "give --text FILE"},
      {{"--router", "kmeans"}, "give --text FILE"},
      {{"--method", "cluster", "--top-k", "9", "--text", text().string()},
       "--top-k must be in [1, --experts], got 9 of 8"},
      {{"--router", "best"}, "--router must be one of random, kmeans, analytic, got best"},
  };
  for (const Case& c : cases) {
    const auto r = upcycle(c.options);
    EXPECT_EQ(r.code, 2) << r.err;
    EXPECT_NE(r.err.find(c.line), std::string::npos) << r.err;
    EXPECT_FALSE(fs::exists(out()));
  }
}

}  // namespace
}  // namespace moegraft
