#include "watch.h"

#include <algorithm>
#include <cstdlib>

#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"
#include "moegraft/kernels/current_device.h"

namespace moegraft::distributed {
namespace {

using Clock = std::chrono::steady_clock;

void end_process(const std::string& line) {
  log::error(line);
  std::_Exit(1);
}

}  // namespace

Watch::Watch(std::chrono::milliseconds timeout, Trouble trouble, End end, at::Device device)
    : device_(device),
      timeout_(timeout),
      trouble_(std::move(trouble)),
      end_(end ? std::move(end) : end_process),
      thread_([this] { run(); }) {}

Watch::~Watch() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Watch::add(c10::intrusive_ptr<c10d::Work> work, Explain explain) {
  const std::lock_guard lock(mutex_);
  entries_.push_back({std::move(work), std::move(explain), Clock::now()});
}

void Watch::run() {
  kernels::make_current(device_);
  const auto pause = std::clamp(timeout_ / 20, std::chrono::milliseconds(10), std::chrono::milliseconds(500));
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, pause, [&] { return stop_; })) {
    std::list<Entry> taken;
    taken.swap(entries_);
    lock.unlock();  // add() never waits for the GPU or the store
    for (auto it = taken.begin(); it != taken.end();) {
      const double seconds = seconds_since(it->begin);
      std::string trouble;
      try {
        if (it->work->isCompleted()) {
          if (const auto error = it->work->exception()) std::rethrow_exception(error);
          it = taken.erase(it);
          continue;
        }
        if (Clock::now() - it->begin > timeout_) {
          trouble = "timed out";
        } else if (seconds > 1 && it == taken.begin() && trouble_ && trouble_()) {  // the oldest
          trouble = "stopped after another rank's trouble";
        }
      } catch (const std::exception& e) { trouble = std::string(e.what()).substr(0, std::string(e.what()).find('\n')); }
      if (!trouble.empty()) {
        end_(it->explain(seconds, trouble));
        it = taken.erase(it);
        continue;
      }
      ++it;
    }
    lock.lock();
    entries_.splice(entries_.begin(), taken);
  }
}

}  // namespace moegraft::distributed
