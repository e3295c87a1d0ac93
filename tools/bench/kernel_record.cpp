#include "kernel_record.h"

#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "moegraft/base/clock.h"

namespace moegraft::tools::bench {
namespace {

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;
using Kind = libkineto::ActivityType;

struct Row {
  int64_t calls = 0;
  uint64_t ns = 0;
};

}  // namespace

uint64_t covered(std::vector<std::pair<uint64_t, uint64_t>> intervals) {
  std::sort(intervals.begin(), intervals.end());
  uint64_t sum = 0, end = 0;
  for (const auto& [from, to] : intervals) {
    if (to <= end) continue;
    sum += to - std::max(from, end);
    end = to;
  }
  return sum;
}

KernelRecord::KernelRecord(at::Device device) : device_(device) {
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<ActivityType> activities{device.is_cuda() ? ActivityType::CUDA : ActivityType::CPU};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  begin_ = std::chrono::steady_clock::now();
}

KernelRecord::~KernelRecord() {
  if (running_) profiler::disableProfiler();
}

nlohmann::json KernelRecord::finish() {
  const double seconds = seconds_since(begin_);
  running_ = false;
  const auto result = profiler::disableProfiler();
  std::vector<std::pair<uint64_t, uint64_t>> kernels, copies;
  std::map<std::string, Row> rows;
  for (const auto& event : result->events()) {
    const auto kind = static_cast<Kind>(event.activityType());
    const bool kernel = kind == (device_.is_cuda() ? Kind::CONCURRENT_KERNEL : Kind::CPU_OP),
               copy = kind == Kind::GPU_MEMCPY || kind == Kind::GPU_MEMSET;
    if (!kernel && !copy) continue;
    (kernel ? kernels : copies).emplace_back(event.startNs(), event.endNs());
    Row& row = rows[event.name()];
    ++row.calls, row.ns += event.durationNs();
  }
  std::vector<std::pair<std::string, Row>> sorted(rows.begin(), rows.end());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.second.ns > b.second.ns; });
  nlohmann::json out{{"recorded_s", seconds},
                     {"busy_s", 1e-9 * double(covered(kernels))},
                     {"launches", kernels.size()},
                     {"copies_s", 1e-9 * double(covered(copies))},
                     {"kernels", nlohmann::json::array()}};
  for (const auto& [name, row] : sorted)
    out["kernels"].push_back({{"name", name}, {"calls", row.calls}, {"s", 1e-9 * double(row.ns)}});
  return out;
}

}  // namespace moegraft::tools::bench
