#pragma once
// A polite stop: SIGINT, SIGTERM, SIGHUP (a closed terminal; unless nohup ignores it) and SIGUSR1 (Slurm's warning
// before the time limit) ask the loop to save and leave.

namespace moegraft::run {

// Exit codes of `moegraft train` and `moegraft codec train`: 0 finished (train.steps or train.max_minutes reached), 1
// failed, 2 bad usage or configuration, 3 stopped by a signal with everything saved: `--resume auto` continues exactly.
// A scheduler requeues on 3.
constexpr int kExitStopped = 3;

// Installs the handlers until destroyed, then restores the former ones. Also ignores SIGXFSZ: a file-size limit then is
// an error that a save reports, not a kill. One at a time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  // The first signal received, 0 when none. Look between optimizer steps. A second SIGINT (Ctrl-C twice) kills at once.
  int received() const;
  bool requested() const { return received() != 0; }
};

// Before there is a loop: the same signals end the process at once with a line and kExitStopped. StopSignals take over
// from it.
class StartSignals {
 public:
  StartSignals();
  ~StartSignals();
  StartSignals(const StartSignals&) = delete;
  StartSignals& operator=(const StartSignals&) = delete;
};

const char* signal_name(int signal);  // "SIGTERM"

}  // namespace moegraft::run
