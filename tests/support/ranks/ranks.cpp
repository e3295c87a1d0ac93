#include "support/ranks/ranks.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <thread>

#include "moegraft/base/check.h"
#include "moegraft/distributed/launch.h"
#include "support/cpu_path.h"

namespace moegraft::testing {
namespace {

std::map<std::string, void (*)()>& bodies() {
  static std::map<std::string, void (*)()> all;
  return all;
}

std::map<std::string, int (*)(int, char**)>& programs() {
  static std::map<std::string, int (*)(int, char**)> all;
  return all;
}

int run_body(const std::string& name) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // no orphans when the test itself is killed
  const auto it = bodies().find(name);
  if (it == bodies().end()) {
    std::cerr << "no rank body '" << name << "'\n";
    return 3;
  }
  try {
    it->second();
    return 0;
  } catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
  }
}

}  // namespace

int register_rank_body(const char* name, void (*body)()) {
  bodies()[name] = body;
  return 0;
}

int register_program(const char* name, int (*program)(int, char**)) {
  programs()[name] = program;
  return 0;
}

std::string rank_argument() {
  const char* text = std::getenv("MOEGRAFT_TEST_ARGUMENT");
  return text ? text : "";
}

Ranks::Ranks(const std::string& body, int n, const std::string& argument, const std::vector<int>& only) {
  const std::string size = std::to_string(n), port = std::to_string(distributed::free_port());
  const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
  std::vector<int> ranks = only;
  for (int r = 0; only.empty() && r < n; ++r) ranks.push_back(r);
  for (const int r : ranks) {
    const std::string rank = std::to_string(r);
    processes_.push_back(std::make_unique<Process>(
        std::vector<std::string>{program, "--cpu-path=" + kernels::cpu_kernels().path},
        std::vector<std::string>{"MOEGRAFT_TEST_RANK=" + body, "MOEGRAFT_TEST_ARGUMENT=" + argument, "RANK=" + rank,
                                 "LOCAL_RANK=" + rank, "WORLD_SIZE=" + size, "LOCAL_WORLD_SIZE=" + size,
                                 "MASTER_ADDR=127.0.0.1", "MASTER_PORT=" + port, "OMP_NUM_THREADS=1",
                                 "OMP_WAIT_POLICY=PASSIVE"}));
  }
}

std::vector<ProcessResult> Ranks::wait(std::chrono::seconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  std::vector<ProcessResult> results;
  for (auto& process : processes_) {
    while (process->running() && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    process->send(SIGKILL);
    results.push_back(process->wait());
  }
  return results;
}

void run_ranks(const std::string& body, int n, const std::string& argument) {
  const auto results =
      Ranks(body, n, argument).wait(std::chrono::seconds(120));  // seconds alone, much longer beside compilers
  for (size_t r = 0; r < results.size(); ++r) {
    EXPECT_EQ(results[r].code, 0) << body << ", rank " << r << " of " << n
                                  << (results[r].signal ? ", ended by signal " + std::to_string(results[r].signal) : "")
                                  << ":\n"
                                  << results[r].err;
  }
}

}  // namespace moegraft::testing

int main(int argc, char** argv) {
  moegraft::testing::take_cpu_path(argc, argv);
  if (argc > 1) {
    const auto program = moegraft::testing::programs().find(argv[1]);
    if (program != moegraft::testing::programs().end()) return program->second(argc, argv);
  }
  if (const char* body = std::getenv("MOEGRAFT_TEST_RANK")) {
    GTEST_FLAG_SET(throw_on_failure, true);
    testing::InitGoogleTest(&argc, argv);
    return moegraft::testing::run_body(body);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
