#pragma once
// How OpenMP's threads wait for each other at the end of a parallel region: they spin where the cores are this
// process's, and sleep at once where they are shared.
//
// A step is hundreds of short regions, and waking a sleeping thread takes as long as many of them: spinning for 0.1-0.3
// ms makes decoding 1.5 times as fast. But a thread that spins while its partner waits for a core burns that core's
// time: 2.4 times the CPU seconds of a step beside five busy loops on two cores. libgomp reads how long to spin once,
// at start, and falls back to a short spin (100 turns) while more OpenMP threads exist than cores (its manual,
// GOMP_SPINCOUNT). So this keeps some more threads, asleep, for as long as the kernel says that this process waits for
// cores.

#include <memory>

namespace moegraft {

class WaitPolicy {
 public:
  // Watches the process's first thread, every 40 ms. Does nothing where the kernel tells of no waiting
  // (/proc/self/schedstat).
  WaitPolicy();
  ~WaitPolicy();
  WaitPolicy(const WaitPolicy&) = delete;

 private:
  struct Watch;
  std::unique_ptr<Watch> watch_;
};

// Whether a thread that ran for cpu_ns and waited for a core for delay_ns, in an interval, shares its cores; `before`:
// what was said of the interval before. Short waits happen on an idle machine too, and a verdict is not turned by one
// interval at the threshold.
bool shares_cores(double cpu_ns, double delay_ns, bool before);

}  // namespace moegraft
