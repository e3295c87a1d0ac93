#include "moegraft/run/signals.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "moegraft/base/check.h"

namespace moegraft::run {
namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGXFSZ};

// Handlers can reach only globals.
std::atomic<int> received_signal{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may not wait");
bool installed = false;
struct sigaction former[std::size(kSignals)];

void on_signal(int signal) {
  int none = 0;
  received_signal.compare_exchange_strong(none, signal);
}

// Nothing has been trained, and what is written appears whole or not at all: the process can end at once.
void on_signal_at_start(int signal) {
  const auto say = [](const char* text) {
    [[maybe_unused]] const auto n = ::write(STDERR_FILENO, text, std::strlen(text));
  };
  say("stopped by ");
  say(signal_name(signal));
  say(" during start-up: nothing was trained yet\n");
  ::_exit(kExitStopped);
}

}  // namespace

StartSignals::StartSignals() {
  for (const int signal : kSignals) {
    struct sigaction action{}, former_one{};
    sigemptyset(&action.sa_mask);
    sigfillset(&action.sa_mask);
    action.sa_handler = signal == SIGXFSZ ? SIG_IGN : on_signal_at_start;
    sigaction(signal, &action, &former_one);
    if (signal == SIGHUP && former_one.sa_handler == SIG_IGN) sigaction(signal, &former_one, nullptr);  // nohup
  }
}
StartSignals::~StartSignals() {
  for (const int signal : kSignals) {
    struct sigaction now{};
    if (sigaction(signal, nullptr, &now) == 0 && now.sa_handler == on_signal_at_start) ::signal(signal, SIG_DFL);
  }
}

StopSignals::StopSignals() {
  MOEGRAFT_INVARIANT(!installed, "StopSignals is installed twice");
  received_signal = 0;
  for (size_t i = 0; i < std::size(kSignals); ++i) {
    struct sigaction action{};
    sigemptyset(&action.sa_mask);
    action.sa_handler = kSignals[i] == SIGXFSZ ? SIG_IGN : on_signal;
    // SA_RESTART: a save in progress must not see EINTR. SA_RESETHAND: the second Ctrl-C kills; a scheduler may repeat
    // the others.
    action.sa_flags = SA_RESTART | (kSignals[i] == SIGINT ? int(SA_RESETHAND) : 0);
    struct sigaction now{};
    if (kSignals[i] == SIGHUP && sigaction(SIGHUP, nullptr, &now) == 0 && now.sa_handler == SIG_IGN)
      action.sa_handler = SIG_IGN;  // nohup
    MOEGRAFT_CHECK(sigaction(kSignals[i], &action, &former[i]) == 0, "cannot handle ", signal_name(kSignals[i]), ": ",
                   std::strerror(errno));
  }
  installed = true;
}

StopSignals::~StopSignals() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &former[i], nullptr);
  installed = false;
}

int StopSignals::received() const { return received_signal.load(std::memory_order_relaxed); }

const char* signal_name(int signal) {
  switch (signal) {
    case SIGINT: return "SIGINT";
    case SIGTERM: return "SIGTERM";
    case SIGHUP: return "SIGHUP";
    case SIGUSR1: return "SIGUSR1";
    case SIGXFSZ: return "SIGXFSZ";
    default: return "a signal";
  }
}

}  // namespace moegraft::run
