#include "moegraft/train/signals.h"

#include <signal.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "moegraft/base/check.h"

namespace moegraft::train {
namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};

// Handlers can reach only globals.
std::atomic<int> received_signal{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may not wait");
bool installed = false;
struct sigaction former[std::size(kSignals)];

void on_signal(int signal) {
  int none = 0;
  received_signal.compare_exchange_strong(none, signal);
}

}  // namespace

StopSignals::StopSignals() {
  MOEGRAFT_INVARIANT(!installed, "StopSignals is installed twice");
  received_signal = 0;
  for (size_t i = 0; i < std::size(kSignals); ++i) {
    struct sigaction action{};
    sigemptyset(&action.sa_mask);
    action.sa_handler = kSignals[i] == SIGXFSZ ? SIG_IGN : on_signal;
    // SA_RESTART: a save in progress must not see EINTR. SA_RESETHAND: the second Ctrl-C kills; a scheduler may repeat the others.
    action.sa_flags = SA_RESTART | (kSignals[i] == SIGINT ? int(SA_RESETHAND) : 0);
    MOEGRAFT_CHECK(sigaction(kSignals[i], &action, &former[i]) == 0, "cannot handle ", signal_name(kSignals[i]), ": ", std::strerror(errno));
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
    case SIGUSR1: return "SIGUSR1";
    case SIGXFSZ: return "SIGXFSZ";
    default: return "a signal";
  }
}

}  // namespace moegraft::train
