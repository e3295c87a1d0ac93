#pragma once
// The vocabulary of the device kernels. A kernel is a functor in one of these headers: either one thread per index,
// `operator()(i)`, or one team of lanes per row, `operator()(row, team)`. A team runs a piece of code for every lane
// (`each`) and reduces what the lanes return (`sum`, `max`, `best`, `softmax`). On the device a lane is a thread; on
// the host the same functor runs lane after lane with the same order of sums (host_run.h), which is how the arithmetic
// and the indexing are tested on a machine without a GPU.

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MOEGRAFT_HD __host__ __device__ __forceinline__
#define MOEGRAFT_UNROLL _Pragma("unroll")
#else
#define MOEGRAFT_HD inline
#define MOEGRAFT_UNROLL
#endif

namespace moegraft::kernels::cuda {

using bf16 = c10::BFloat16;

// V consecutive elements moved together: 16 bytes of bf16 at V = 8, where the address allows it; V = 1 anywhere.
template <class T, int V>
struct alignas(V * sizeof(T) >= 16 ? 16 : V * sizeof(T)) Pack {
  T at[V];
};

template <int V, class T>
MOEGRAFT_HD void load(const T* from, float (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
  for (int i = 0; i < V; ++i) to[i] = static_cast<float>(pack.at[i]);
}
// On the device 16 bytes at a time by an intrinsic: nvcc splits the copy of a pack into its elements where two of them
// are stored (Rotate: seven stores for the second). A pack that is only moved (GatherRows) stays whole.
template <int V, class T>
MOEGRAFT_HD void store(const float (&from)[V], T* to) {
  Pack<T, V> pack;
  for (int i = 0; i < V; ++i) pack.at[i] = static_cast<T>(from[i]);
#if defined(__CUDA_ARCH__)
  if constexpr (V == 8 && sizeof(T) == 2) {
    const auto two = [&](int i) { return uint32_t(pack.at[i].x) | uint32_t(pack.at[i + 1].x) << 16; };
    __stwb(reinterpret_cast<uint4*>(to), make_uint4(two(0), two(2), two(4), two(6)));
  } else if constexpr (V == 8) {
    const auto four = [&](int i) { return make_float4(pack.at[i], pack.at[i + 1], pack.at[i + 2], pack.at[i + 3]); };
    __stwb(reinterpret_cast<float4*>(to), four(0));
    __stwb(reinterpret_cast<float4*>(to) + 1, four(4));
  } else
#endif
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}
template <int V, class T>
MOEGRAFT_HD void add(const T* from, float (&to)[V]) {
  float more[V];
  load<V>(from, more);
  for (int i = 0; i < V; ++i) to[i] += more[i];
}

// Counting is done with integers, whose sum has no order.
MOEGRAFT_HD void count_one(int32_t* counter) {
#if defined(__CUDA_ARCH__)
  atomicAdd(counter, 1);
#else
  ++*counter;
#endif
}

struct Candidate {
  float value;
  int32_t index;  // -1: none
};
// The larger value wins; of equal values the lower index.
MOEGRAFT_HD Candidate better(const Candidate& a, const Candidate& b) {
  if (a.index < 0) return b;
  if (b.index < 0) return a;
  if (a.value != b.value) return a.value > b.value ? a : b;
  return a.index < b.index ? a : b;
}
// What a softmax is divided by: the sum of exp(x - largest).
struct SoftmaxSum {
  float largest, total;
};
MOEGRAFT_HD float rescaled(const SoftmaxSum& s, float largest) {
  return s.largest == largest ? s.total : s.total * expf(s.largest - largest);
}
// The order of a and b changes no bit, also where the compiler contracts: of the two totals only that of the smaller
// maximum is multiplied.
MOEGRAFT_HD SoftmaxSum together(const SoftmaxSum& a, const SoftmaxSum& b) {
  return a.largest >= b.largest ? SoftmaxSum{a.largest, a.total + rescaled(b, a.largest)}
                                : SoftmaxSum{b.largest, b.total + rescaled(a, b.largest)};
}
struct Add {
  MOEGRAFT_HD float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  MOEGRAFT_HD float operator()(float a, float b) const { return a > b ? a : b; }
};
struct Better {
  MOEGRAFT_HD Candidate operator()(const Candidate& a, const Candidate& b) const { return better(a, b); }
};
struct Together {
  MOEGRAFT_HD SoftmaxSum operator()(const SoftmaxSum& a, const SoftmaxSum& b) const { return together(a, b); }
};

// What a team offers, over a `reduce(f, op)` that every implementation supplies: within a warp by butterflies, across
// warps in warp order.
template <class Derived>
struct TeamBase {
  template <class F>
  MOEGRAFT_HD float sum(const F& f) const {
    return static_cast<const Derived*>(this)->reduce(f, Add{});
  }
  template <class F>
  MOEGRAFT_HD float max(const F& f) const {
    return static_cast<const Derived*>(this)->reduce(f, Larger{});
  }
  template <class F>
  MOEGRAFT_HD Candidate best(const F& f) const {
    return static_cast<const Derived*>(this)->reduce(f, Better{});
  }
  template <class F>
  MOEGRAFT_HD SoftmaxSum softmax(const F& f) const {
    return static_cast<const Derived*>(this)->reduce(f, Together{});
  }
};

}  // namespace moegraft::kernels::cuda
