// tools/gpu_bringup.sh: what it says when something is wrong, and the report of whatever is there. Its stages run as a
// test of their own (gpu_bringup in ctest).
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "support/paths.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

const std::string kRoot = test_source_dir();

testing::ProcessResult bringup(std::vector<std::string> words, const std::vector<std::string>& environment = {}) {
  words.insert(words.begin(), {"/usr/bin/env", "bash", kRoot + "/tools/gpu_bringup.sh"});
  return testing::Process(words, environment).wait();
}

TEST(GpuBringup, SaysWhatItDoesAndWhatItMisses) {
  const testing::TemporaryFolder folder;
  const std::string out = (folder / "out").string();
  const auto help = bringup({"--help"});
  EXPECT_EQ(help.code, 0);
  for (const char* word : {"pack", "tests|micro|step", "report", "dry-run", "Example"})
    EXPECT_NE(help.out.find(word), std::string::npos) << word;
  EXPECT_EQ(bringup({}).code, 2);
  const auto unknown = bringup({"fly"});
  EXPECT_EQ(unknown.code, 2);
  EXPECT_NE(unknown.err.find("unknown word fly"), std::string::npos) << unknown.err;
  EXPECT_EQ(bringup({"tests", "--device", "tpu"}).code, 2);
  if (testing::reference_python(kRoot, "torch").empty()) GTEST_SKIP() << "no Python with torch";
  const auto unpacked = bringup({"tests", "--device", "cpu", "--out", out, "--packed", (folder / "nothing").string()});
  EXPECT_EQ(unpacked.code, 2);
  EXPECT_NE(unpacked.err.find("run tools/gpu_bringup.sh pack"), std::string::npos) << unpacked.err;
}

TEST(GpuBringup, ReportsWhateverIsThere) {
  const testing::TemporaryFolder folder;
  const auto report = [&] { return bringup({"report", "--out", folder.path().string()}); };
  const auto nothing = report();
  EXPECT_EQ(nothing.code, 0) << nothing.err;
  EXPECT_NE(nothing.out.find("not measured"), std::string::npos);

  const auto step = [](double seconds) {
    return io::Json{{"tool", "moegraft"},
                    {"layers", 48},
                    {"sequences", 2},
                    {"seq", 4096},
                    {"optimizer", "adamw"},
                    {"recompute_layers", 0},
                    {"tokens_per_s", 8192 / seconds},
                    {"best_step_s", seconds},
                    {"median_step_s", seconds},
                    {"peak_mib", 70000.0},
                    {"reserved_mib", 71000.0},
                    {"card_used_mib", 72000.0},
                    {"share_of_limit", 0.4},
                    {"card", {{"name", "a card"}}}};
  };
  const auto write = [&](const std::string& name, const std::string& text) {
    std::filesystem::create_directories((folder / name).parent_path());
    io::write_file_atomic(folder / name, text);
  };
  write("step/two-4k.json", step(0.55).dump() + "\n");
  write("step/no-adapters.json", step(0.5).dump());
  write("step/four-4k.json", "{\"tokens_per_s\": 1");  // cut off
  write("step/one-4k.json", "{\"a\": 1}");             // foreign
  write("tests/probe.json", "5");
  write("micro/ops.json", "{\"ops\": [{\"op\": \"moe_ffn\"}]}");  // of another version
  write(
      "tests/kernels.xml",
      R"(<?xml version="1.0"?><testsuites tests="3" time="1.5"><testsuite name="A"><testcase name="good" classname="A"/><testcase name="bad" classname="A"><failure message="x != y"/></testcase>
    <testcase name="left" classname="A" result="skipped"><skipped message="no GPU"/></testcase></testsuite></testsuites>)");
  write(
      "step/parts.jsonl",
      R"({"stage": "step", "part": "two-4k", "status": "failed", "seconds": 3, "code": 1, "reason": "first try", "device": "cuda", "commit": "abc"}
{"stage": "step", "part": "two-4k", "status": "ok", "seconds": 4, "code": 0, "reason": "", "device": "cuda", "commit": "abc"}
)");
  const auto some = report();
  ASSERT_EQ(some.code, 0) << some.err;
  for (const char* text :
       {"Commit abc, on cuda", "a card", "| 14 895 |", "| 73.40 |", "Adapters cost 10.0 %",
        "| kernels | 1 | 1 | 1 | 1.5 |", "A.bad: x != y", "Not readable", "| step | two-4k | ok | 4 |"})
    EXPECT_NE(some.out.find(text), std::string::npos) << text << "\n" << some.out;
  EXPECT_EQ(some.out.find("first try"), std::string::npos);
  EXPECT_EQ(io::read_file(folder / "report.md") + "\n", some.out);
  EXPECT_EQ(bringup({"report", "--out", (folder / "tests/kernels.xml" / "x").string()}).code, 2);
}

}  // namespace
}  // namespace moegraft
