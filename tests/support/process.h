#pragma once
// Child processes of tests: the moegraft binary above all.

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace moegraft::testing {

struct ProcessResult {
  int code = -1;   // exit code; -1 when a signal ended it
  int signal = 0;  // the signal that ended it, or 0
  std::string out, err;
};

// A started program; killed by the destructor when it still runs.
class Process {
 public:
  // argv[0] is the program. environment: "NAME=value" entries on top of this process's.
  explicit Process(const std::vector<std::string>& argv, const std::vector<std::string>& environment = {});
  ~Process();
  Process(const Process&) = delete;
  pid_t pid() const { return pid_; }
  bool running();
  void send(int signal);
  ProcessResult wait();
  std::string output() const;  // of stdout, so far
  std::string errors() const;  // of stderr, so far

 private:
  bool reap(bool block);
  pid_t pid_ = -1;
  int out_ = -1, err_ = -1, status_ = 0;  // unlinked files
  bool done_ = false;
};

// The binary that MOEGRAFT_BIN names (set by ctest), or the one beside the tests' folder. Empty when it is not built:
// tests then skip.
std::filesystem::path moegraft_binary();

// How to start torchrun: MOEGRAFT_TORCHRUN, or the one of the environment under `root`/.venv that LibTorch's wheel is
// in. Empty: none that works there (the wheel is installed without the Python packages that it would need).
std::vector<std::string> torchrun(const std::filesystem::path& root);

// `moegraft ARGS…`, on the CPU path that this program was kept to (cpu_path.h).
std::vector<std::string> moegraft_command(const std::vector<std::string>& args);

// Runs that to its end.
ProcessResult run_moegraft(const std::vector<std::string>& args);

}  // namespace moegraft::testing
