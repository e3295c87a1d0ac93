// Launchers with real processes: `moegraft launch` (linked into this program) and torchrun.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <regex>
#include <thread>

#include "command.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/distributed/world.h"
#include "support/paths.h"
#include "support/ranks/ranks.h"

namespace moegraft::distributed {
namespace {

namespace fs = std::filesystem;
using moegraft::testing::Process;
using moegraft::testing::ProcessResult;
using moegraft::testing::rank_argument;

int run_launch(int argc, char** argv) {
  CLI::App app{"test", "test"};
  app.require_subcommand(1);
  app.add_subcommand("train", "a sibling with the name of what is launched");
  tools::add_launch_command(app);
  try {
    tools::parse(app, argc, argv);
    return 0;
  } catch (const CLI::RuntimeError& e) { return e.get_exit_code(); } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const UsageError& e) {
    std::cerr << e.what() << '\n';
    return 2;
  }
}
const int registered = moegraft::testing::register_program("launch", run_launch);

std::string program() { return fs::read_symlink("/proc/self/exe").string(); }

std::vector<std::string> body_variables(const std::string& body, const std::string& argument) {
  return {"MOEGRAFT_TEST_RANK=" + body, "MOEGRAFT_TEST_ARGUMENT=" + argument, "OMP_WAIT_POLICY=PASSIVE"};
}

ProcessResult launch(const std::vector<std::string>& options, const std::string& body,
                     const std::string& argument = {}) {
  std::vector<std::string> argv = {program(), "launch"};
  argv.insert(argv.end(), options.begin(), options.end());
  return Process(argv, body_variables(body, argument)).wait();
}

class Launchers : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "moegraft-launch-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string read(const std::string& name) const {
    std::ifstream in(folder_ / name);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // The file, once it is there.
  std::string await(const std::string& name) const {
    for (int i = 0; i < 1000 && read(name).empty(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return read(name);
  }
  fs::path folder_;
};

void note(const std::string& name, const std::string& text) {
  const fs::path path = fs::path(rank_argument()) / name;
  std::ofstream(path.string() + ".new") << text;
  fs::rename(path.string() + ".new", path);
}

// Writes what it was told, and that the sum over all ranks is right.
RANK_BODY(report) {
  at::set_num_threads(1);
  const auto e = read_launch_environment();
  auto world = World::join(e, {.timeout = std::chrono::seconds(20)});
  at::Tensor sum = at::full({3}, static_cast<double>(e.rank + 1));
  world->all().all_reduce(sum, "ranks").wait();
  const char* threads = std::getenv("OMP_NUM_THREADS");
  note(std::to_string(e.rank),
       detail::concat(e.launcher, ' ', e.world_size, ' ', e.local_rank, ' ', e.local_world_size, ' ', e.restart, ' ',
                      e.agent_store, ' ', sum[2].item<double>(), " threads ", threads ? threads : "?"));
  std::cerr << "hello from " << e.rank << '\n';
}

// The first start: rank 1 is killed in the middle of a collective. The second succeeds.
RANK_BODY(killed_once) {
  at::set_num_threads(1);
  const auto e = read_launch_environment();
  auto world = World::join(e, {.timeout = std::chrono::seconds(20)});
  world->agree({{"config", "same"}});
  at::Tensor sum = at::ones({1000});
  for (int64_t step = 0; step < 20; ++step) {
    if (e.restart == 0 && e.rank == 1 && step == 10) raise(SIGKILL);
    world->all().all_reduce(sum, "step " + std::to_string(step)).wait();
    sum.fill_(1);
  }
  note(std::to_string(e.rank), "restart " + std::to_string(e.restart));
}

RANK_BODY(exit_code) {
  const auto e = read_launch_environment();
  if (e.rank == 1) _exit(std::stoi(rank_argument()));
  if (rank_argument() != "3") std::this_thread::sleep_for(std::chrono::seconds(20));
}

RANK_BODY(sleeper) {
  const auto e = read_launch_environment();
  signal(SIGTERM, [](int) { _exit(3); });  // as the trainer does after saving
  note("pid" + std::to_string(e.rank), std::to_string(getpid()));
  std::this_thread::sleep_for(std::chrono::seconds(20));
}

TEST_F(Launchers, LaunchGivesEachRankItsPlace) {
  for (const bool dashes : {true, false}) {
    std::vector<std::string> options = {"--nproc", "2"};
    if (dashes) options.push_back("--");
    options.insert(options.end(), {"train", "-c", "x.yaml", "--set", "a=b"});
    const auto result = launch(options, "report", folder_.string());
    EXPECT_EQ(result.code, 0) << result.err;
    const int threads = std::max(1, int(std::thread::hardware_concurrency()) / 2);
    EXPECT_EQ(read("0").substr(0, 32), "torchrun 2 0 2 0 0 3 threads " + std::to_string(threads)) << read("0");
    EXPECT_EQ(read("1").substr(0, 20), "torchrun 2 1 2 0 0 3");
    EXPECT_NE(("\n" + result.err).find("\nhello from 0\n"), std::string::npos) << result.err;
    EXPECT_NE(result.err.find("[rank 1] hello from 1\n"), std::string::npos) << result.err;
    EXPECT_EQ(result.err.find("[rank 0]"), std::string::npos) << result.err;
  }
}

TEST_F(Launchers, LaunchStartsAgainAfterAKill) {
  auto result = launch({"--nproc", "2", "--max-restarts", "1", "--", "train"}, "killed_once", folder_.string());
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_NE(result.err.find("rank 1 was ended by signal 9; starting all 2 ranks again (1 of 1)"), std::string::npos)
      << result.err;
  for (const char* rank : {"0", "1"}) EXPECT_EQ(read(rank), "restart 1");
  result = launch({"--nproc", "2", "--", "train"}, "killed_once", folder_.string());
  EXPECT_EQ(result.code, 128 + SIGKILL);
  EXPECT_NE(result.err.find("rank 1 was ended by signal 9"), std::string::npos) << result.err;
}

TEST_F(Launchers, LaunchPassesExitCodesOn) {
  const auto seconds = [](auto&& f) {
    const auto begin = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  EXPECT_LT(seconds([&] { EXPECT_EQ(launch({"--nproc", "2", "--", "train"}, "exit_code", "7").code, 7); }), 8);
  // Restarting cures neither a bad configuration nor a run that was asked to stop.
  for (const char* code : {"2", "3"}) {
    const auto result = launch({"--nproc", "2", "--max-restarts", "3", "--", "train"}, "exit_code", code);
    EXPECT_EQ(result.code, std::stoi(code));
    EXPECT_EQ(result.err.find("again"), std::string::npos);
  }
}

TEST_F(Launchers, LaunchForwardsSignalsOnce) {
  Process launcher({program(), "launch", "--nproc", "2", "--max-restarts", "3", "--", "train"},
                   body_variables("sleeper", folder_.string()));
  await("pid0"), await("pid1");
  launcher.send(SIGTERM);
  const auto result = launcher.wait();
  EXPECT_EQ(result.code, 3) << result.err;
}

TEST_F(Launchers, RanksEndWithTheLauncher) {
  std::vector<pid_t> pids;
  {
    Process launcher({program(), "launch", "--nproc", "2", "--", "train"}, body_variables("sleeper", folder_.string()));
    for (const char* name : {"pid0", "pid1"}) pids.push_back(std::stoi(await(name)));
    launcher.send(SIGKILL);
  }
  for (const pid_t pid : pids) {
    // An orphan that has ended may stay a zombie where process 1 does not reap.
    const auto ended = [&] {
      std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
      const std::string text((std::istreambuf_iterator<char>(in)), {});
      return text.empty() || text.find(") Z ") != std::string::npos;
    };
    for (int i = 0; i < 300 && !ended(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_TRUE(ended()) << pid;
  }
}

TEST_F(Launchers, LaunchRefusesBadUsage) {
  EXPECT_EQ(launch({"--nproc", "0", "--", "train"}, "report").code, 2);
  EXPECT_EQ(launch({"--", "train"}, "report").code, 2);
  const auto result = launch({"--nproc", "2"}, "report");
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.err.find("name the command to run"), std::string::npos) << result.err;
  EXPECT_NE(launch({"--help"}, "report").out.find("Example:\n  moegraft launch --nproc 4"), std::string::npos);
}

ProcessResult run_torchrun(std::vector<std::string> argv, const std::vector<std::string>& options,
                           const std::string& body, const std::string& argument) {
  argv.insert(argv.end(), options.begin(), options.end());
  argv.insert(argv.end(), {"--standalone", "--no-python", "--nproc-per-node", "2", program()});
  return Process(argv, body_variables(body, argument)).wait();
}

TEST_F(Launchers, Torchrun) {
  const auto argv = testing::torchrun(test_source_dir());
  if (argv.empty()) GTEST_SKIP() << "no torchrun that works: set MOEGRAFT_TORCHRUN, or tools/setup.sh --tests";
  const auto result = run_torchrun(argv, {}, "report", folder_.string());
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(read("0").substr(0, 20), "torchrun 2 0 2 0 1 3") << result.err;
  EXPECT_EQ(read("1").substr(0, 20), "torchrun 2 1 2 0 1 3") << result.err;
}

TEST_F(Launchers, TorchrunStartsAgainAfterAKill) {
  const auto argv = testing::torchrun(test_source_dir());
  if (argv.empty()) GTEST_SKIP() << "no torchrun that works: set MOEGRAFT_TORCHRUN, or tools/setup.sh --tests";
  const auto result =
      run_torchrun(argv, {"--max-restarts", "1", "--monitor-interval", "0.1"}, "killed_once", folder_.string());
  EXPECT_EQ(result.code, 0) << result.err;
  for (const char* rank : {"0", "1"}) EXPECT_EQ(read(rank), "restart 1") << result.err;
}

}  // namespace
}  // namespace moegraft::distributed
