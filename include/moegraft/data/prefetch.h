#pragma once
// Steps' batches made ahead by one background thread.

#include <cstdint>
#include <memory>
#include <string>

#include "moegraft/data/stream.h"

namespace moegraft::data {

// The steps of `feed`, in its order, byte for byte. The thread starts with the first next() and keeps at most `depth`
// steps ready. state(), counts() and epochs() are those of the last step handed out, not of the last one made, so a
// checkpoint never depends on how far ahead the thread was. Warnings of the feed are passed on with the step they
// belong to, in the thread that calls next(). What the feed throws is thrown by the next() that would have returned the
// step, and by every later one until restore(); the steps before it come first. The feed's next() runs in the
// background thread, all else in the caller's; the object itself is for one thread.
class PrefetchStream : public BatchFeed {
 public:
  // depth 0: no thread, steps are made in next(). pin: in page-locked memory, for a copy to a GPU that does not block
  // the host.
  PrefetchStream(std::unique_ptr<BatchFeed> feed, int64_t depth, bool pin = false);
  ~PrefetchStream() override;  // waits for the step being made, drops the ready ones
  PrefetchStream(PrefetchStream&&) noexcept;

  StepBatch next() override;
  std::string state() const override;
  void restore(
      const std::string& state) override;  // drops what was made ahead; after an error the stream is where it was
  StreamCounts counts() const override;
  double epochs() const override;
  void set_warn(Warn warn) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moegraft::data
