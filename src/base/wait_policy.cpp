#include "moegraft/base/wait_policy.h"

#include <omp.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <optional>
#include <thread>

namespace moegraft {
namespace {

constexpr auto kInterval = std::chrono::milliseconds(40);
constexpr int kQuietIntervals = 12;  // after which cores count as free again

struct Times {
  double cpu_ns = 0, delay_ns = 0;
  bool known = false;
};
Times times_of_first_thread() {
  Times t;
  std::ifstream file("/proc/self/schedstat");
  t.known = bool(file >> t.cpu_ns >> t.delay_ns);
  return t;
}

// Signals are for the threads that were there before.
template <class F>
std::thread without_signals(const F& f) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(f);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

// A flag that a thread sleeps on.
class Ending {
 public:
  void announce() {
    {
      const std::lock_guard lock(mutex_);
      announced_ = true;
    }
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return announced_; });
  }
  bool wait_for(std::chrono::milliseconds time) {  // true: announced
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, time, [&] { return announced_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool announced_ = false;
};

// More OpenMP threads than there are cores, asleep, while it lives.
class Crowd {
 public:
  Crowd()
      : thread_(without_signals([this] {
#pragma omp parallel num_threads(omp_get_num_procs() + 1)
          asm volatile(
              "");  // makes the threads, which then sleep until this one ends; an empty region would be optimised away
          end_.wait();
        })) {
  }
  ~Crowd() {
    end_.announce();
    thread_.join();
  }

 private:
  Ending end_;
  std::thread thread_;
};

}  // namespace

bool shares_cores(double cpu_ns, double delay_ns, bool before) {
  return delay_ns > (before ? 0.02 : 0.1) * (cpu_ns + delay_ns) && delay_ns > 1e6;
}

struct WaitPolicy::Watch {
  Ending end;
  std::thread thread;

  void run() {
    Times last = times_of_first_thread();
    if (!last.known) return;
    std::optional<Crowd> crowd;
    for (int quiet = 0; !end.wait_for(kInterval);) {
      const Times now = times_of_first_thread();
      const bool shared = shares_cores(now.cpu_ns - last.cpu_ns, now.delay_ns - last.delay_ns, crowd.has_value());
      last = now;
      quiet = shared ? 0 : quiet + 1;
      if (shared && !crowd)
        crowd.emplace();
      else if (quiet >= kQuietIntervals)
        crowd.reset();
    }
  }
};

WaitPolicy::WaitPolicy() : watch_(std::make_unique<Watch>()) {
  watch_->thread = without_signals([this] { watch_->run(); });
}
WaitPolicy::~WaitPolicy() {
  watch_->end.announce();
  watch_->thread.join();
}

}  // namespace moegraft
