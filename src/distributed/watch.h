#pragma once
// Collectives on a GPU do not hold the host, so nobody would notice that one never ends. One thread per process looks
// after those under way.

#include <chrono>
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace moegraft::distributed {

class Watch {
 public:
  // end: told when a collective has failed, or outlived the timeout: its explanation and what the backend said. It does
  // not return to a host that may be waiting for the GPU for ever; the default logs the line and ends the process
  // with 1.
  using End = std::function<void(const std::string& line)>;
  // trouble(): another rank has failed. Asked now and then while something has been under way for longer than a second.
  using Trouble = std::function<bool()>;
  // device: what the collectives run on.
  explicit Watch(std::chrono::milliseconds timeout, Trouble trouble = {}, End end = {}, at::Device device = at::kCPU);
  ~Watch();

  // explain(seconds, cause): the line for this collective.
  using Explain = std::function<std::string(double, const std::string&)>;
  void add(c10::intrusive_ptr<c10d::Work> work, Explain explain);

 private:
  struct Entry {
    c10::intrusive_ptr<c10d::Work> work;
    Explain explain;
    std::chrono::steady_clock::time_point begin;
  };
  void run();
  at::Device device_;
  std::chrono::milliseconds timeout_;
  Trouble trouble_;
  End end_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Entry> entries_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace moegraft::distributed
