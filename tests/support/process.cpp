#include "support/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "moegraft/base/check.h"
#include "moegraft/kernels/cpu.h"
#include "paths.h"

namespace moegraft::testing {
namespace {

int unlinked_file() {
  std::string pattern = (std::filesystem::temp_directory_path() / "moegraft-out-XXXXXX").string();
  const int fd = mkostemp(pattern.data(), O_CLOEXEC);
  MOEGRAFT_CHECK(fd >= 0, "cannot make ", pattern);
  unlink(pattern.c_str());
  return fd;
}

std::string contents(int fd) {
  std::string text;
  char buffer[4096];
  for (off_t at = 0;;) {
    const ssize_t n = pread(fd, buffer, sizeof buffer, at);
    if (n <= 0) return text;
    text.append(buffer, size_t(n));
    at += n;
  }
}

}  // namespace

Process::Process(const std::vector<std::string>& argv, const std::vector<std::string>& environment)
    : out_(unlinked_file()), err_(unlinked_file()) {
  std::vector<char*> arguments;
  for (const auto& a : argv) arguments.push_back(const_cast<char*>(a.c_str()));
  arguments.push_back(nullptr);
  pid_ = fork();
  MOEGRAFT_CHECK(pid_ >= 0, "fork failed");
  if (pid_ == 0) {
    dup2(out_, STDOUT_FILENO);
    dup2(err_, STDERR_FILENO);
    for (const auto& entry : environment) putenv(const_cast<char*>(entry.c_str()));
    execv(arguments[0], arguments.data());
    _exit(127);
  }
}

Process::~Process() {
  if (!done_) {
    kill(pid_, SIGKILL);
    reap(true);
  }
  close(out_);
  close(err_);
}

bool Process::reap(bool block) {
  if (!done_) done_ = waitpid(pid_, &status_, block ? 0 : WNOHANG) == pid_;
  return done_;
}

bool Process::running() { return !reap(false); }

void Process::send(int signal) {
  if (!reap(false)) kill(pid_, signal);
}

ProcessResult Process::wait() {
  reap(true);
  ProcessResult result;
  if (WIFEXITED(status_)) result.code = WEXITSTATUS(status_);
  if (WIFSIGNALED(status_)) result.signal = WTERMSIG(status_);
  result.out = output();
  result.err = errors();
  return result;
}

std::string Process::output() const { return contents(out_); }
std::string Process::errors() const { return contents(err_); }

std::filesystem::path moegraft_binary() {
  const char* name = std::getenv("MOEGRAFT_BIN");
  const std::filesystem::path path =
      name ? std::filesystem::path(name) : std::filesystem::path(test_binary_dir()) / "moegraft";
  return std::filesystem::exists(path) ? path : std::filesystem::path();
}

std::vector<std::string> torchrun(const std::filesystem::path& root) {
  if (const char* path = std::getenv("MOEGRAFT_TORCHRUN")) return {path};
  const std::filesystem::path python = root / ".venv/bin/python";
  const std::vector<std::string> argv{python.string(), "-m", "torch.distributed.run"};
  if (!std::filesystem::exists(python) || Process({argv[0], argv[1], argv[2], "--help"}).wait().code != 0) return {};
  return argv;
}

std::vector<std::string> moegraft_command(const std::vector<std::string>& args) {
  std::vector<std::string> argv{moegraft_binary().string()};
  MOEGRAFT_CHECK(!argv[0].empty(), "the moegraft binary is not built");
  if (const auto cpu = kernels::cpu_kernels(); cpu.path != cpu.best_path)
    argv.insert(argv.end(), {"--cpu-path", cpu.path});
  argv.insert(argv.end(), args.begin(), args.end());
  return argv;
}

ProcessResult run_moegraft(const std::vector<std::string>& args) { return Process(moegraft_command(args)).wait(); }

}  // namespace moegraft::testing
