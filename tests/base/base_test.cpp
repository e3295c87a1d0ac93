#include <gtest/gtest.h>

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/numa.h"
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
  } catch (const UsageError& e) { EXPECT_STREQ(e.what(), "adapters[0].rank must be in [1, 1024], got 0"); }
  EXPECT_THROW(MOEGRAFT_INVARIANT(rank == 1, "rank"), InvariantError);
  EXPECT_NO_THROW(MOEGRAFT_CHECK(rank == 0, "no"));
}

// A machine's nodes as the kernel shows them.
class Nodes {
 public:
  Nodes(const char* machine, const std::vector<std::pair<std::string, std::string>>& lists)
      : path(std::filesystem::path(testing::TempDir()) / (std::string(machine) + std::to_string(getpid()))) {
    for (const auto& [name, cpus] : lists) {
      std::filesystem::create_directories(path / name);
      std::ofstream(path / name / "cpulist") << cpus << '\n';
    }
  }
  ~Nodes() { std::filesystem::remove_all(path); }
  const std::filesystem::path path;
};

std::vector<int> affinity() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

TEST(Numa, KnowsTheNodesThatItMayUse) {
  const std::vector<int> mine = affinity();
  const std::string last = std::to_string(mine.back());
  const Nodes nodes("moegraft-odd-", {{"node10", last + "," + std::to_string(CPU_SETSIZE + 5)},
                                      {"node2", "0-1023"},
                                      {"node3", ""},
                                      {"node4", "7-2"},
                                      {"node5", "x"},
                                      {"nodes", "0"},
                                      {"cpu0", "0"}});
  const auto found = usable_numa_nodes(nodes.path);
  ASSERT_EQ(found.size(), 2u);  // in the order of their numbers
  EXPECT_EQ(found[0].id, 2);
  EXPECT_EQ(found[0].cpus, mine);
  EXPECT_EQ(found[1].id, 10);
  EXPECT_EQ(found[1].cpus, std::vector<int>{mine.back()});
  EXPECT_TRUE(usable_numa_nodes("/no/such/folder").empty());
}

TEST(Numa, SharesNodesEvenly) {
  const auto shares = [](int64_t nodes, int64_t count) {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (int64_t i = 0; i < count; ++i) all.push_back(numa_share(nodes, i, count));
    return all;
  };
  using Shares = std::vector<std::pair<int64_t, int64_t>>;
  EXPECT_EQ(shares(2, 1), (Shares{{0, 2}}));
  EXPECT_EQ(shares(2, 2), (Shares{{0, 1}, {1, 2}}));
  EXPECT_EQ(shares(2, 4), (Shares{{0, 1}, {0, 1}, {1, 2}, {1, 2}}));
  EXPECT_EQ(shares(8, 2), (Shares{{0, 4}, {4, 8}}));
  EXPECT_EQ(shares(2, 3), (Shares{{0, 1}, {0, 1}, {1, 2}}));
  EXPECT_EQ(shares(4, 3), (Shares{{0, 1}, {1, 2}, {2, 4}}));
}

TEST(Numa, RunsAProcessOnItsNodeAndLeavesOthersAlone) {
  const std::vector<int> mine = affinity();
  if (mine.size() < 2) GTEST_SKIP() << "one core: nothing to share";
  const Nodes two("moegraft-two-", {{"node0", std::to_string(mine[0])}, {"node1", std::to_string(mine[1])}});
  // In a child, whose affinity may change. Its exit code says which check failed.
  const auto in_child = [](const auto& check) {
    const pid_t pid = fork();
    if (pid == 0) _exit(check());
    int status = 0;
    waitpid(pid, &status, 0);
    return WEXITSTATUS(status);
  };
  EXPECT_EQ(in_child([&] {
              const std::string done = arrange_numa(1, 2, two.path);
              if (done != "on NUMA node 1") return 1;
              if (affinity() != std::vector<int>{mine[1]}) return 2;
              return arrange_numa(0, 2, two.path).empty() && affinity() == std::vector<int>{mine[1]}
                         ? 0
                         : 3;  // bound to one node: that stands
            }),
            0);
  const Nodes one("moegraft-one-", {{"node0", "0-1023"}});
  EXPECT_EQ(in_child([&] { return arrange_numa(1, 2, one.path).empty() && affinity() == mine ? 0 : 1; }), 0);
  EXPECT_EQ(in_child([&] {
              arrange_numa(0, 1, two.path);  // alone: its cores stay, whatever became of its pages
              return affinity() == mine ? 0 : 1;
            }),
            0);
}

TEST(Rng, PhiloxKnownAnswer) {
  // Random123's kat_vectors: philox4x32-10 with key 0 and counter 0. Purpose hashing is xored into the key, so undo it
  // by constructing a stream and comparing two equal ones, and check the statistical basics instead of the raw key
  // schedule.
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
  EXPECT_NEAR(sum / n, 0, 0.01);  // 4.5 standard errors
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
  EXPECT_EQ(nearest_word("img", {"image"}), "image");
  EXPECT_EQ(nearest_word("foo", {"ot", "run", "model"}), "") << "one letter of three in common is not near";
}

TEST(Text, SplitJoinTrim) {
  EXPECT_EQ(join(split("a.b..c", '.'), "|"), "a|b||c");
  EXPECT_EQ(trim("  x y \n"), "x y");
}

TEST(Text, MessagesAreOneLineThatATerminalDoesNotObey) {
  const std::pair<std::string, std::string> cases[] = {
      {"plain text, \u00e9 \U0001F600 \u4e2d", "plain text, \u00e9 \U0001F600 \u4e2d"},
      {"a\nb\r\n\tc", "a\\nb\\r\\n\\tc"},
      {"\x1b[31mred\x07\x7f", "\\x1b[31mred\\x07\\x7f"},
      {std::string("nul\0.", 5), "nul\\x00."},
      {"\u009b31m\u0085", "\\u009b31m\\u0085"},                                    // control characters of two bytes
      {"\u202egnp.exe\u2066\u200f\u2028", "\\u202egnp.exe\\u2066\\u200f\\u2028"},  // direction, line separator
      {"\xff\xc3(\xe2\x82", "\\xff\\xc3(\\xe2\\x82"},                              // ill-formed
  };
  for (const auto& [text, shown] : cases) EXPECT_EQ(printable(text), shown);
}

TEST(Progress, Formats) {
  EXPECT_EQ(format_seconds(3723), "1:02:03");
  EXPECT_EQ(format_seconds(65.4), "1:05");
  EXPECT_EQ(format_count(4730000), "4.73 M");
}

}  // namespace
}  // namespace moegraft
