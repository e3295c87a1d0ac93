#include "moegraft/run/signals.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "moegraft/base/check.h"

namespace moegraft::run {
namespace {

TEST(Signals, EachAsksForAStop) {
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) {
    StopSignals signals;
    EXPECT_FALSE(signals.requested());
    raise(signal);
    EXPECT_EQ(signals.received(), signal) << signal_name(signal);
  }
  EXPECT_STREQ(signal_name(SIGUSR1), "SIGUSR1");
}

TEST(Signals, TheFirstIsReportedAndTheSchedulersMayRepeat) {
  StopSignals signals;
  raise(SIGUSR1);
  raise(SIGTERM);
  raise(SIGTERM);
  EXPECT_EQ(signals.received(), SIGUSR1);
}

TEST(Signals, ASecondInterruptKills) {
  const pid_t child = fork();
  if (child == 0) {
    StopSignals signals;
    raise(SIGINT);
    if (signals.received() != SIGINT) _exit(9);
    raise(SIGINT);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGINT);
}

TEST(Signals, FormerHandlersComeBack) {
  const auto former = signal(SIGTERM, SIG_IGN);
  { StopSignals signals; }
  struct sigaction now{};
  sigaction(SIGTERM, nullptr, &now);
  EXPECT_EQ(now.sa_handler, SIG_IGN);
  signal(SIGTERM, former);
}

TEST(Signals, OnlyOneAtATime) {
  StopSignals signals;
  EXPECT_THROW(StopSignals(), InvariantError);
}

}  // namespace
}  // namespace moegraft::run
