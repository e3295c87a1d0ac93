#pragma once
// What a device ran in one stretch of work, kernel by kernel, by its own clock (CUPTI, through torch's recorder);
// nothing is waited for in between.

#include <ATen/core/Tensor.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace moegraft::tools::bench {

// Nanoseconds that at least one of the intervals {begin, end} covers.
uint64_t covered(std::vector<std::pair<uint64_t, uint64_t>> intervals);

// Process-wide: one at a time.
class KernelRecord {
 public:
  // Begins. Device idle. On a CPU the operations are recorded instead of kernels, so that the tests can run this; a
  // figure of theirs would mean nothing.
  explicit KernelRecord(at::Device device);
  ~KernelRecord();
  KernelRecord(const KernelRecord&) = delete;

  // Ends; the work is done. {recorded_s: of the whole stretch, busy_s: at least one kernel ran, copies_s, launches,
  // kernels: [{name, calls, s}], longest first}
  nlohmann::json finish();

 private:
  at::Device device_;
  std::chrono::steady_clock::time_point begin_;
  bool running_ = true;
};

}  // namespace moegraft::tools::bench
