#pragma once
// How an operation finds what computes it: a list of implementations in the order of preference. The first that serves
// a call runs; the last serves every call and is the plain one, as a rule of ATen's operations. Which implementation
// serves depends on devices, dtypes, shapes and the CPU's path alone, so that equal calls take equal ways.
//
//   struct Implementation {
//     bool (*serves)(const Call&);
//     at::Tensor (*run)(const Call&);
//   };
//   constexpr Implementation kImplementations[]{{cuda_serves, run_cuda}, {blocks_serve, run_blocks}, {kAlways,
//   run_aten}}; … choose(kImplementations, call).run(call) …

#include <cstddef>

namespace moegraft::kernels {

constexpr std::nullptr_t kAlways = nullptr;  // `serves` of the last implementation

template <class Implementation, size_t N, class Call>
const Implementation& choose(const Implementation (&in_order)[N], const Call& call) {
  for (size_t i = 0; i + 1 < N; ++i)
    if (in_order[i].serves(call)) return in_order[i];
  return in_order[N - 1];
}

}  // namespace moegraft::kernels
