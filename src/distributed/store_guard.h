#pragma once
// A store's client waits for its server without limit: a server that is frozen, or whose machine has gone, would hold
// every rank for ever. One thread per process looks at calls that are under way, and ends the process when one outlives
// its limit.

#include <chrono>
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace moegraft::distributed {

class StoreGuard {
 public:
  using End = std::function<void(const std::string& line)>;
  // who: the server, as an error names it. end: told once when a call has outlived its limit; the default logs the line
  // and ends the process with 1.
  explicit StoreGuard(std::string who, End end = {});
  ~StoreGuard();

  // A call under way, from construction to destruction.
  class Call {
   public:
    Call(StoreGuard& guard, std::chrono::milliseconds limit);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    StoreGuard& guard_;
    std::list<std::pair<std::chrono::steady_clock::time_point, std::chrono::milliseconds>>::iterator entry_;
  };

 private:
  friend class Call;
  void run();
  std::string who_;
  End end_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<std::pair<std::chrono::steady_clock::time_point, std::chrono::milliseconds>> calls_;  // begin, limit
  bool stop_ = false;
  std::thread thread_;
};

// A view of a store for backends that connect: waiting for a key ends when another rank has failed, and not only at the
// timeout. trouble(): whether one has.
c10::intrusive_ptr<c10d::Store> stop_at_trouble(c10::intrusive_ptr<c10d::Store> store, std::function<bool()> trouble);

}  // namespace moegraft::distributed
