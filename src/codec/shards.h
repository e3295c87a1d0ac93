#pragma once
// Work on pictures, cut into shards that run on one thread each.

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <atomic>

namespace moegraft::codec {

// Runs f(0) … f(count - 1); whoever is free takes the next. Inside, operations do not fork, so that threads meet once
// for all of it: a network this small forks hundreds of times a step otherwise, and oneDNN's bf16 convolution gradients
// spin between threads without ever sleeping, which takes whole time slices where the cores are shared (twice the CPU
// time beside five jobs on two cores).
template <class F>
void run_shards(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    // oneDNN asks for this number even inside a parallel region, and would wait for threads that never come. It belongs
    // to the calling thread's task alone. ATen sets it in each thread that it meets for the first time, which asking
    // ATen brings forward.
    const int before = at::get_num_threads();
    omp_set_num_threads(1);
    struct Restore {
      int threads;
      ~Restore() { omp_set_num_threads(threads); }
    } restore{before};
    for (int64_t i; (i = next.fetch_add(1)) < count;) f(i);
  });
}

}  // namespace moegraft::codec
