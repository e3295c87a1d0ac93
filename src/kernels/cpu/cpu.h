#pragma once
// What the CPU paths share.

#include "libtorch.h"

namespace moegraft::kernels {

// Dtypes with a hand-written CPU loop; the rest is composed of ATen operations.
inline bool has_cpu_path(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

// Whether an operation on these belongs into autograd's graph. Decoding takes the other way: a node costs as much as a
// small product.
template <class... T>
bool recorded(const T&... inputs) {
  return at::GradMode::is_enabled() && ((inputs.defined() && inputs.requires_grad()) || ...);
}

// Spreads independent tasks over the threads when there are enough of them; otherwise the library calls inside a task
// use the threads. The choice depends on shapes only, so equal calls give equal bits.
template <class F>
void run_tasks(int64_t count, bool cpu, const F& f) {
  if (!cpu || count < at::get_num_threads()) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;  // autograd's state is per thread
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace moegraft::kernels
