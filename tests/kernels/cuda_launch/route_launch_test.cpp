#include "launch_case.h"

#include "kernels/cuda/loss_kernels.h"
#include "kernels/cuda/route_kernels.h"
#include "kernels/cuda/routing_kernels.h"

namespace moegraft::kernels::cuda {

struct Routing {
  int64_t E, K;
};
inline constexpr Routing kRoutings[] = {{1, 1}, {33, 4}, {128, 8}};

// Every fourth row holds no number.
inline float* logits_with_nan(Arrays& a, int64_t rows, int64_t width) {
  float* x = a.random<float>(rows * width, 3);
  for (int64_t r = 3; r < rows; r += 4) std::fill_n(x + r * width, width, NAN);
  return x;
}

template <>
struct Case<RouteForward> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    for (const auto& [E, K] : kRoutings)
      for (const bool renormalise : {false, true})
        Run::rows(RouteForward{logits_with_nan(a, tokens, E), a.empty<float>(tokens * E), a.empty<int64_t>(tokens * K),
                               a.empty<float>(tokens * K), E, K, renormalise},
                  tokens);
  }
};

template <>
struct Case<RouteBackward> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    for (const auto& [E, K] : kRoutings)
      for (const int given : {1, 2, 3}) {  // gradients of the weights, of the probabilities
        const int64_t experts = E;
        Run::rows(RouteBackward{a.random<float>(tokens * E),
                                a.fill<int64_t>(tokens * K, [&](int64_t i) { return (i * 7 + 3) % experts; }),
                                a.random<float>(tokens * K), given & 1 ? a.random<float>(tokens * K) : nullptr,
                                given & 2 ? a.random<float>(tokens * E) : nullptr, a.empty<float>(tokens * E), E, K,
                                given != 2},
                  tokens);
      }
  }
};

template <class TIn, class TOut>
constexpr int pack_of<CrossEntropyRow<TIn, TOut>> = CrossEntropyRow<TIn, TOut>::kPack;
template <class TIn, class TOut>
struct Case<CrossEntropyRow<TIn, TOut>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    for (const int64_t V : {5, 4099}) {
      const int64_t classes = V;  // odd: the second row starts inside a pack
      const auto targets = [&] {
        return a.fill<int64_t>(rows, [&](int64_t r) { return r == 2 ? classes : r * 13 % classes; });
      };  // one out of range
      Run::rows(
          CrossEntropyRow<TIn, TOut>{a.random<TIn>(rows * V, 4), targets(), nullptr, a.empty<float>(rows), V, 0.25f},
          rows);
      Run::rows(CrossEntropyRow<TIn, TOut>{a.random<TIn>(rows * V, 4), targets(), a.empty<TOut>(rows * V),
                                           a.empty<float>(rows), V, 0.25f},
                rows);
      if constexpr (std::is_same_v<TIn, TOut>) {
        TIn* logits = a.random<TIn>(rows * V, 4);
        Run::rows(CrossEntropyRow<TIn, TOut>{logits, targets(), logits, a.empty<float>(rows), V, 0.25f}, rows);
      }
    }
  }
};

template <>
struct Case<RoutingPartial> {
  template <class Run>
  static void run(Arrays& a, int64_t chunks) {
    const int64_t tokens = std::max<int64_t>(chunks * kRoutingTokens - 13, 0), M = 2;  // the last chunk is not full
    for (const auto& [E, K] : kRoutings) {
      const int64_t experts = E;
      const auto ids = [&] { return a.fill<int64_t>(tokens * K, [&](int64_t i) { return (i * 7 + 3) % experts; }); };
      const auto probs = [&] {
        return a.fill<float>(tokens * E, [&](int64_t i) { return float(i % 9) / 8; });
      };  // zeros among them
      Run::rows(RoutingPartial{probs(), ids(), nullptr, a.empty<float>(chunks * (2 * E + 3)), tokens, E, K, 1, 0.5f},
                chunks);
      Run::rows(RoutingPartial{probs(), ids(), a.fill<int64_t>(tokens, [](int64_t t) { return t % 3 == 1; }),
                               a.empty<float>(chunks * M * (2 * E + 3)), tokens, E, K, M, 0.5f},
                chunks);
    }
  }
};

template <>
struct Case<AddRoutingPartials> {
  template <class Run>
  static void run(Arrays& a, int64_t count) {
    Run::threads(AddRoutingPartials{a.random<float>(7 * count),
                                    a.fill<double>(count, [](int64_t i) { return double(i) / 3; }), 7, count},
                 count);
  }
};

}  // namespace moegraft::kernels::cuda

#include "kernels/cuda/route_kernels.cu"
