#include "moegraft/data/prefetch.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/kernels/current_device.h"
#include "moegraft/model/device.h"

namespace moegraft::data {
namespace {

// Where a feed stands after a step.
struct Position {
  std::string state;
  StreamCounts counts;
  double epochs = 0;
};

Position position_of(const BatchFeed& feed) { return {feed.state(), feed.counts(), feed.epochs()}; }

// A step, or the error in its place.
struct Ready {
  StepBatch step;
  Position after;
  std::vector<std::string> warnings;
  std::exception_ptr error;
};

}  // namespace

struct PrefetchStream::Impl {
  const std::unique_ptr<BatchFeed> feed;
  const size_t depth;
  const bool pin;
  const c10::Device device = pin ? kernels::current_device(at::kCUDA) : c10::Device(at::kCPU);  // the maker's
  Warn warn = [](const std::string& message) { log::warning(message); };
  Position handed_out;
  std::exception_ptr failed;          // what the feed threw, once it was its turn
  std::vector<std::string> warnings;  // of the step being made

  std::mutex mutex;
  std::condition_variable changed;  // at most one side waits: the queue is never full and empty
  std::deque<Ready> ready;
  bool stopping = false;
  std::thread worker;

  Impl(std::unique_ptr<BatchFeed> source, int64_t ahead, bool page_locked)
      : feed(std::move(source)), depth(static_cast<size_t>(ahead)), pin(page_locked), handed_out(position_of(*feed)) {
    feed->set_warn([this](const std::string& message) { warnings.push_back(message); });
  }
  ~Impl() { stop(); }

  Ready make() {
    Ready item;
    try {
      item.step = feed->next();
      if (pin)
        for (auto& batch : item.step.micro_batches) batch = model::pin(batch);
      item.after = position_of(*feed);
    } catch (...) { item.error = std::current_exception(); }
    item.warnings = std::exchange(warnings, {});
    return item;
  }

  // Until told to stop, or until the feed throws.
  void work() {
    kernels::make_current(device);
    for (bool go_on = true; go_on;) {
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return stopping || ready.size() < depth; });
        if (stopping) return;
      }
      Ready item = make();
      go_on = item.error == nullptr;
      {
        const std::lock_guard lock(mutex);
        ready.push_back(std::move(item));
      }
      changed.notify_one();
    }
  }

  Ready take() {
    if (!worker.joinable()) worker = std::thread([this] { work(); });
    Ready item;
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return !ready.empty(); });
      item = std::move(ready.front());
      ready.pop_front();
    }
    changed.notify_one();
    return item;
  }

  // Afterwards the feed is the caller's alone.
  void stop() {
    {
      const std::lock_guard lock(mutex);
      stopping = true;
    }
    changed.notify_one();
    if (worker.joinable()) worker.join();
    stopping = false;
    ready.clear();
  }
};

PrefetchStream::PrefetchStream(std::unique_ptr<BatchFeed> feed, int64_t depth, bool pin) {
  MOEGRAFT_INVARIANT(feed != nullptr && depth >= 0, "PrefetchStream needs a feed and a depth of at least 0, got ",
                     depth);
  impl_ = std::make_unique<Impl>(std::move(feed), depth, pin);
}

PrefetchStream::~PrefetchStream() = default;
PrefetchStream::PrefetchStream(PrefetchStream&&) noexcept = default;

StepBatch PrefetchStream::next() {
  if (impl_->failed) std::rethrow_exception(impl_->failed);
  Ready item = impl_->depth > 0 ? impl_->take() : impl_->make();
  for (const auto& message : item.warnings) impl_->warn(message);
  if (item.error) {
    impl_->failed = item.error;
    std::rethrow_exception(item.error);
  }
  impl_->handed_out = std::move(item.after);
  return std::move(item.step);
}

std::string PrefetchStream::state() const { return impl_->handed_out.state; }

void PrefetchStream::restore(const std::string& state) {
  impl_->stop();
  impl_->warnings.clear();
  impl_->failed = nullptr;
  try {
    impl_->feed->restore(state);
  } catch (...) {
    impl_->feed->restore(impl_->handed_out.state);
    throw;
  }
  impl_->handed_out = position_of(*impl_->feed);
}

StreamCounts PrefetchStream::counts() const { return impl_->handed_out.counts; }
double PrefetchStream::epochs() const { return impl_->handed_out.epochs; }
void PrefetchStream::set_warn(Warn warn) { impl_->warn = std::move(warn); }

}  // namespace moegraft::data
