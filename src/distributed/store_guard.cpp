#include "store_guard.h"

#include <cstdlib>
#include <stdexcept>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"

namespace moegraft::distributed {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

void end_process(const std::string& line) {
  log::error(line);
  std::_Exit(1);
}

class StoppingStore : public c10d::Store {
 public:
  StoppingStore(c10::intrusive_ptr<c10d::Store> store, std::function<bool()> trouble)
      : store_(std::move(store)), trouble_(std::move(trouble)) {
    timeout_ = store_->getTimeout();
  }
  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::make_intrusive<StoppingStore>(store_->clone(), trouble_);
  }
  void set(const std::string& key, const std::vector<uint8_t>& value) override { store_->set(key, value); }
  std::vector<uint8_t> compareSet(const std::string& key, const std::vector<uint8_t>& expected,
                                  const std::vector<uint8_t>& desired) override {
    return store_->compareSet(key, expected, desired);
  }
  std::vector<uint8_t> get(const std::string& key) override {
    wait({key});
    return store_->get(key);
  }
  int64_t add(const std::string& key, int64_t value) override { return store_->add(key, value); }
  bool deleteKey(const std::string& key) override { return store_->deleteKey(key); }
  bool check(const std::vector<std::string>& keys) override { return store_->check(keys); }
  int64_t getNumKeys() override { return store_->getNumKeys(); }
  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }
  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    auto look = Clock::now() + 200ms;
    for (const auto deadline = Clock::now() + timeout; !store_->check(keys);) {
      if (Clock::now() > deadline) throw std::runtime_error("timed out");
      if (Clock::now() > look) {
        if (trouble_()) throw std::runtime_error("stopped after another rank's trouble");
        look = Clock::now() + 200ms;
      }
      std::this_thread::sleep_for(2ms);
    }
  }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  std::function<bool()> trouble_;
};

}  // namespace

StoreGuard::StoreGuard(std::string who, End end)
    : who_(std::move(who)), end_(end ? std::move(end) : end_process), thread_([this] { run(); }) {}

StoreGuard::~StoreGuard() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void StoreGuard::run() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, 250ms, [&] { return stop_; }))
    for (const auto& [begin, limit] : calls_) {
      if (Clock::now() - begin <= limit) continue;
      lock.unlock();
      end_(detail::concat(who_, " has not answered for ", double(limit.count()) / 1000,
                          " s: it is frozen, or its machine cannot be reached"));
      return;
    }
}

StoreGuard::Call::Call(StoreGuard& guard, std::chrono::milliseconds limit) : guard_(guard) {
  const std::lock_guard lock(guard_.mutex_);
  entry_ = guard_.calls_.insert(guard_.calls_.end(), {Clock::now(), limit});
}
StoreGuard::Call::~Call() {
  const std::lock_guard lock(guard_.mutex_);
  guard_.calls_.erase(entry_);
}

c10::intrusive_ptr<c10d::Store> stop_at_trouble(c10::intrusive_ptr<c10d::Store> store, std::function<bool()> trouble) {
  return c10::make_intrusive<StoppingStore>(std::move(store), std::move(trouble));
}

}  // namespace moegraft::distributed
