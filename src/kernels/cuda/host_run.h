#pragma once
// Runs the device functors on the host, lane after lane: for tests of their logic without a GPU.

#include <functional>
#include <vector>

#include "team.h"

namespace moegraft::kernels::cuda {

template <int N>
struct HostTeam : TeamBase<HostTeam<N>> {
  static_assert(N % 32 == 0, "teams are whole warps");

  template <class F>
  void each(const F& f) const {
    for (int lane = 0; lane < N; ++lane) f(lane);
  }
  template <class F, class Op>
  auto reduce(const F& f, const Op& op) const {
    using V = decltype(f(0));
    std::vector<V> values;
    for (int lane = 0; lane < N; ++lane) values.push_back(f(lane));
    for (int offset = 16; offset > 0; offset /= 2) {
      const std::vector<V> before = values;
      for (int lane = 0; lane < N; ++lane) values[lane] = op(before[lane], before[lane ^ offset]);
    }
    V total = values[0];
    for (int warp = 1; warp < N / 32; ++warp) total = op(total, values[warp * 32]);
    return total;
  }
};

struct OnHost {
  // While set, launches are also kept: each with the addresses that it has now, as a device's graph keeps them.
  static inline std::vector<std::function<void()>>* record = nullptr;

  template <class F>
  static void threads(const F& f, int64_t count) {
    launch([f, count] {
      for (int64_t i = 0; i < count; ++i) f(i);
    });
  }
  template <class F>
  static void rows(const F& f, int64_t count) {
    launch([f, count] {
      for (int64_t i = 0; i < count; ++i) f(i, HostTeam<F::kLanes>());
    });
  }

 private:
  template <class F>
  static void launch(const F& f) {
    f();
    if (record) record->push_back(f);
  }
};

}  // namespace moegraft::kernels::cuda
