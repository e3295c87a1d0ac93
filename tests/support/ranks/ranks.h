#pragma once
// Tests of several processes: RANK_BODY(name) { … } is what each process runs; Ranks("name", n) starts the test program
// n times with a launcher's variables for it. In a body gtest's EXPECT and ASSERT throw; whatever it throws goes to
// stderr, and the process ends with 1.

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "support/process.h"

namespace moegraft::testing {

int register_rank_body(const char* name, void (*body)());

#define RANK_BODY(name)                                                                                       \
  static void rank_body_##name();                                                                             \
  static const int rank_registered_##name = ::moegraft::testing::register_rank_body(#name, rank_body_##name); \
  static void rank_body_##name()

// What the test passed to the body (empty: nothing).
std::string rank_argument();

// `test_x NAME …` runs program instead of the tests.
int register_program(const char* name, int (*program)(int, char**));

class Ranks {
 public:
  // Starts ranks 0 … n-1, or only those listed.
  Ranks(const std::string& body, int n, const std::string& argument = {}, const std::vector<int>& only = {});
  // All results in order; what still runs at the deadline is killed (signal 9 in its result).
  std::vector<ProcessResult> wait(std::chrono::seconds limit = std::chrono::seconds(30));
  Process& operator[](int i) { return *processes_.at(static_cast<size_t>(i)); }

 private:
  std::vector<std::unique_ptr<Process>> processes_;
};

// Runs them to their end and expects success of each.
void run_ranks(const std::string& body, int n, const std::string& argument = {});

}  // namespace moegraft::testing
