// moegraft launch: a run of several processes on this machine, with torchrun's variables.
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/distributed/launch.h"

extern char** environ;

namespace moegraft::tools {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  int processes = 0, max_restarts = 0, port = 0;
  std::vector<std::string> command;
};

constexpr auto kGrace = std::chrono::seconds(10);  // between SIGTERM and SIGKILL
constexpr int kUsage = 2, kSaved = 3;              // exit codes that a restart would not change: see main.cpp

struct Child {
  pid_t pid = -1;
  int rank = 0;
  int errors = -1;  // read end of stderr; -1: inherited
  std::string line;
  bool running = true;
};

int usable_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

std::vector<std::string> environment_of(const Options& o, int rank, int port, int restart, const std::string& token) {
  std::vector<std::string> all;
  const auto own = {"RANK=",        "LOCAL_RANK=",  "WORLD_SIZE=",   "LOCAL_WORLD_SIZE=",
                    "MASTER_ADDR=", "MASTER_PORT=", "TORCHELASTIC_", "MOEGRAFT_TOKEN="};
  for (char** entry = environ; *entry; ++entry) {
    bool ours = false;
    for (const char* name : own) ours = ours || std::strncmp(*entry, name, std::strlen(name)) == 0;
    if (!ours) all.emplace_back(*entry);
  }
  const auto set = [&](const char* name, const auto& value) { all.push_back(detail::concat(name, '=', value)); };
  set("RANK", rank), set("LOCAL_RANK", rank), set("WORLD_SIZE", o.processes), set("LOCAL_WORLD_SIZE", o.processes);
  set("MASTER_ADDR", "127.0.0.1"), set("MASTER_PORT", port), set("TORCHELASTIC_RESTART_COUNT", restart);
  set("MOEGRAFT_TOKEN", token);
  if (!std::getenv("OMP_NUM_THREADS")) set("OMP_NUM_THREADS", std::max(1, usable_cores() / o.processes));
  return all;
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> all;
  for (const auto& text : texts) all.push_back(const_cast<char*>(text.c_str()));
  all.push_back(nullptr);
  return all;
}

// One start of all ranks, to its end.
class Attempt {
 public:
  Attempt(const Options& o, const std::vector<std::string>& arguments, int signals, int restart) : signals_(signals) {
    const int port = o.port > 0 ? o.port : distributed::free_port();
    const std::string token = distributed::random_token();
    for (int r = 0; r < o.processes; ++r) start(r, arguments, environment_of(o, r, port, restart, token));
  }
  ~Attempt() {
    for (auto& child : children_) {
      if (child.running) kill(child.pid, SIGKILL), waitpid(child.pid, nullptr, 0);
      if (child.errors >= 0) close(child.errors);
    }
  }

  // The exit code of the first rank that failed, or 0.
  int wait() {
    while (running() > 0) {
      std::vector<pollfd> watched = {{signals_, POLLIN, 0}};
      for (const auto& child : children_) {
        if (child.errors >= 0) watched.push_back({child.errors, POLLIN, 0});
      }
      poll(watched.data(), watched.size(), stopping_ ? 100 : 1000);
      take_signals();
      for (auto& child : children_) forward_errors(child);
      reap();
      if (stopping_ && Clock::now() > kill_at_) tell(SIGKILL);
    }
    for (auto& child : children_) forward_errors(child);
    return code_;
  }
  bool asked_to_stop() const { return asked_; }
  const std::string& what() const { return what_; }

 private:
  int64_t running() const {
    int64_t n = 0;
    for (const auto& child : children_) n += child.running;
    return n;
  }

  void tell(int signal) {
    for (const auto& child : children_) {
      if (child.running) kill(child.pid, signal);
    }
  }

  void start(int rank, const std::vector<std::string>& arguments, const std::vector<std::string>& environment) {
    int ends[2] = {-1, -1};
    MOEGRAFT_CHECK(rank == 0 || pipe2(ends, O_CLOEXEC) == 0, "launch: no pipe for rank ", rank, " (",
                   std::strerror(errno), ")");
    const auto argv = pointers(arguments), envp = pointers(environment);
    const pid_t parent = getpid(), pid = fork();
    MOEGRAFT_CHECK(pid >= 0, "launch: cannot start rank ", rank, " (", std::strerror(errno), ")");
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      setpgid(0, 0);  // a terminal's Ctrl-C comes to us alone, and each rank gets it once
      sigset_t none;
      sigemptyset(&none);
      sigprocmask(SIG_SETMASK, &none, nullptr);
      if (rank > 0) {
        dup2(ends[1], STDERR_FILENO);
        if (const int null = open("/dev/null", O_RDONLY); null >= 0) dup2(null, STDIN_FILENO);
      }
      execve("/proc/self/exe", argv.data(), envp.data());
      _exit(127);
    }
    if (rank > 0) {
      close(ends[1]);
      fcntl(ends[0], F_SETFL, O_NONBLOCK);
    }
    children_.push_back({pid, rank, ends[0], {}, true});
  }

  void take_signals() {
    signalfd_siginfo info;
    while (read(signals_, &info, sizeof info) == sizeof info) {
      if (info.ssi_signo == SIGCHLD) continue;
      if (asked_) {  // asked twice: the ranks decide what that means, but not for longer than the grace
        stopping_ = true;
        kill_at_ = Clock::now() + kGrace;
      }
      asked_ = true;
      tell(static_cast<int>(info.ssi_signo));
    }
  }

  static void print(const Child& child, const std::string& line) {
    const std::string text = detail::concat("[rank ", child.rank, "] ", line, '\n');
    (void)!write(STDERR_FILENO, text.data(), text.size());
  }

  void forward_errors(Child& child) {
    char buffer[4096];
    while (child.errors >= 0) {
      const ssize_t n = read(child.errors, buffer, sizeof buffer);
      if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (n <= 0) {
        if (!child.line.empty()) print(child, child.line);
        close(std::exchange(child.errors, -1));
        return;
      }
      child.line.append(buffer, static_cast<size_t>(n));
      for (size_t end; (end = child.line.find('\n')) != std::string::npos; child.line.erase(0, end + 1))
        print(child, child.line.substr(0, end));
    }
  }

  void reap() {
    const bool known = code_ != 0;
    bool by_signal = false;
    for (auto& child : children_) {
      int status = 0;
      if (!child.running || waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
      child.running = false;
      const bool signalled = WIFSIGNALED(status);
      const int code = signalled ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
      // Of several that have ended by now, one ended by a signal came first: the others noticed.
      if (code == 0 || known || (code_ != 0 && (by_signal || !signalled))) continue;
      code_ = code;
      by_signal = signalled;
      what_ = detail::concat("rank ", child.rank, signalled ? " was ended by signal " : " ended with code ",
                             signalled ? WTERMSIG(status) : code);
    }
    if (known || code_ == 0 || code_ == kSaved) return;  // all ranks stop together after saving
    stopping_ = true;
    kill_at_ = Clock::now() + kGrace;
    tell(SIGTERM);
  }

  int signals_;
  std::vector<Child> children_;
  bool asked_ = false, stopping_ = false;
  Clock::time_point kill_at_;
  int code_ = 0;
  std::string what_;
};

int launch(const Options& o, const std::vector<std::string>& arguments) {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGCHLD}) sigaddset(&set, signal);
  sigprocmask(SIG_BLOCK, &set, nullptr);
  const int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  MOEGRAFT_CHECK(signals >= 0, "launch: cannot wait for signals (", std::strerror(errno), ")");
  for (int restart = 0;; ++restart) {
    Attempt attempt(o, arguments, signals, restart);
    const int code = attempt.wait();
    const bool final =
        code == 0 || code == kUsage || code == kSaved || attempt.asked_to_stop() || restart == o.max_restarts;
    if (!final) {
      log::warning("launch: ", attempt.what(), "; starting all ", o.processes, " ranks again (", restart + 1, " of ",
                   o.max_restarts, ")");
      continue;
    }
    close(signals);
    if (code != 0 && code != kSaved)
      log::error("launch: ", attempt.what(),
                 restart > 0 ? detail::concat(" after ", restart, restart == 1 ? " restart" : " restarts") : "");
    return code;
  }
}

// `launch --nproc 2 train -c x` as `launch --nproc 2 -- train -c x`: CLI11 would read the command's options as
// launch's.
std::vector<std::string> separate_launched(std::vector<std::string> arguments) {
  auto at = std::find_if(arguments.begin(), arguments.end(), [](const std::string& a) { return !a.starts_with("-"); });
  if (at == arguments.end() || *at != "launch") return arguments;
  for (++at; at < arguments.end() && at->starts_with("--") && *at != "--"; ++at)
    if (at->find('=') == std::string::npos && *at != "--help" && ++at == arguments.end()) return arguments;
  if (at < arguments.end() && !at->starts_with("-")) arguments.insert(at, "--");
  return arguments;
}

}  // namespace

void parse(CLI::App& app, int argc, char** argv) {
  auto arguments = separate_launched({argv + 1, argv + argc});
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes them
  app.parse(std::move(arguments));
}

void add_launch_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  auto* command = app.add_subcommand("launch", "Run a command as several processes on this machine");
  command->footer(
      "Example:\n  moegraft launch --nproc 4 --max-restarts 3 -- train -c configs/quickstart/graft.yaml\n"
      "Several machines: torchrun --no-python --nnodes 2 --nproc-per-node 8 … moegraft train -c …, srun moegraft train "
      "…, or mpirun.");
  command->add_option("--nproc", o->processes, "Number of processes; required")->check(CLI::Range(1, 4096));
  command->add_option("--max-restarts", o->max_restarts, "How often all processes start again after one of them failed")
      ->check(not_negative())
      ->capture_default_str();
  command->add_option("--master-port", o->port, "Port where they meet (0: any free one)")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  command->add_option("command", o->command, "What each process runs: a moegraft command with its options, after --");
  command->callback([o] {
    auto arguments = o->command;
    // Not required(): CLI11 would not say that it stands in the wrong place.
    MOEGRAFT_CHECK_USAGE(o->processes > 0,
                         "launch: --nproc N, from 1 to 4096, must be given before the command, such as: moegraft "
                         "launch --nproc 2 -- train -c run.yaml");
    MOEGRAFT_CHECK_USAGE(!arguments.empty(),
                         "launch: name the command to run, such as: moegraft launch --nproc 2 -- train -c run.yaml");
    arguments.insert(arguments.begin(), "moegraft");
    if (const int code = launch(*o, arguments)) throw CLI::RuntimeError(code);
  });
}

}  // namespace moegraft::tools
