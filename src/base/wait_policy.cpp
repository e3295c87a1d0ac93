#include "moegraft/base/wait_policy.h"

#include <omp.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <thread>

namespace moegraft {
namespace {

constexpr auto kInterval = std::chrono::milliseconds(40);

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

}  // namespace

bool shares_cores(double cpu_ns, double delay_ns, bool before) { return delay_ns > (before ? 0.02 : 0.1) * (cpu_ns + delay_ns) && delay_ns > 1e6; }

struct WaitPolicy::Watch {
  std::mutex mutex;
  std::condition_variable wake;
  bool ends = false;
  std::thread thread;

  bool sleep(std::unique_lock<std::mutex>& lock) {  // false: to end
    return !wake.wait_for(lock, kInterval, [&] { return ends; });
  }
  void run() {
    Times last = times_of_first_thread();
    if (!last.known) return;
    std::unique_lock lock(mutex);
    std::thread crowd;
    std::condition_variable leave;
    bool crowded = false;
    for (int quiet = 0; sleep(lock);) {
      const Times now = times_of_first_thread();
      const bool shared = shares_cores(now.cpu_ns - last.cpu_ns, now.delay_ns - last.delay_ns, crowded);
      last = now;
      quiet = shared ? 0 : quiet + 1;
      if (shared && !crowded) {
        crowded = true;
        crowd = without_signals([&] {
#pragma omp parallel num_threads(omp_get_num_procs() + 1)
          asm volatile("");  // makes the threads, which then sleep until this one ends; an empty region would be optimised away
          std::unique_lock inside(mutex);
          leave.wait(inside, [&] { return !crowded; });
        });
      } else if (crowded && quiet >= 12) {
        crowded = false;
        leave.notify_all();
        lock.unlock();
        crowd.join();
        lock.lock();
      }
    }
    crowded = false;
    leave.notify_all();
    lock.unlock();
    if (crowd.joinable()) crowd.join();
  }
};

WaitPolicy::WaitPolicy() : watch_(std::make_unique<Watch>()) {
  watch_->thread = without_signals([this] { watch_->run(); });
}
WaitPolicy::~WaitPolicy() {
  {
    const std::lock_guard lock(watch_->mutex);
    watch_->ends = true;
  }
  watch_->wake.notify_all();
  watch_->thread.join();
}

}  // namespace moegraft
