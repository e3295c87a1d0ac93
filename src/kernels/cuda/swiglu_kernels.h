#pragma once
// silu(g) * u with low-rank deltas added on the way, and its backward with the routing weight's gradient.

#include "team.h"

namespace moegraft::kernels::cuda {

MOEGRAFT_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One thread per (row, V columns). delta_g, delta_u (null: no term) count on rows whose bits meet acting_*; g and u are
// then rewritten with the sum, which is what backward needs. h is computed from the rounded sums, as backward
// recomputes it.
template <class T, int V>
struct SwigluForward {
  T *g, *u;
  int64_t ld_g, ld_u;
  const T *delta_g, *delta_u;
  int64_t ld_delta;
  const uint32_t* row_bits;
  uint32_t acting_g, acting_u;
  T* h;
  int64_t width;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t packs = width / V, row = i / packs, column = i % packs * V;
    float a[V], b[V], out[V];
    load<V>(g + row * ld_g + column, a);
    load<V>(u + row * ld_u + column, b);
    const uint32_t bits = row_bits ? row_bits[row] : 0;
    if (delta_g && (bits & acting_g)) {
      add<V>(delta_g + row * ld_delta + column, a);
      store<V>(a, g + row * ld_g + column);
    }
    if (delta_u && (bits & acting_u)) {
      add<V>(delta_u + row * ld_delta + column, b);
      store<V>(b, u + row * ld_u + column);
    }
    for (int v = 0; v < V; ++v) {
      const float gate = static_cast<float>(static_cast<T>(a[v])), up = static_cast<float>(static_cast<T>(b[v]));
      out[v] = gate * sigmoid(gate) * up;
    }
    store<V>(out, h + row * width + column);
  }
};

// One warp per row. dh: gradient of h before the row's weight; delta (null: none) is added on rows whose bits meet
// `acting`. Out: dg, du times the row's weight (null: 1); h again, and dot = <h, dh>, the gradient of the weight, where
// asked for.
template <class T, int V>
struct SwigluBackward {
  static constexpr int kLanes = 32;
  const T *dh, *delta;
  const uint32_t* row_bits;
  uint32_t acting;
  const T *g, *u;
  int64_t ld_g, ld_u;
  const float* row_weights;
  T *dg, *du;
  int64_t ld_out;
  T* h;
  float* dot;
  int64_t width;

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t row, const Team& team) const {
    const float weight = row_weights ? row_weights[row] : 1.0f;
    const bool add_delta = delta && (row_bits[row] & acting);
    const float total = team.sum([&](int lane) {
      float part = 0;
      for (int64_t j = int64_t(lane) * V; j < width; j += int64_t(kLanes) * V) {
        float a[V], b[V], d[V], hidden[V];
        load<V>(g + row * ld_g + j, a);
        load<V>(u + row * ld_u + j, b);
        load<V>(dh + row * width + j, d);
        if (add_delta) add<V>(delta + row * width + j, d);
        for (int v = 0; v < V; ++v) {
          const float s = sigmoid(a[v]), silu = a[v] * s;
          hidden[v] = silu * b[v];
          part += hidden[v] * d[v];
          const float wd = weight * d[v];
          a[v] = wd * b[v] * s * (1.0f + a[v] * (1.0f - s));
          b[v] = wd * silu;
        }
        store<V>(a, dg + row * ld_out + j);
        store<V>(b, du + row * ld_out + j);
        if (h) store<V>(hidden, h + row * width + j);
      }
      return part;
    });
    if (dot)
      team.each([&](int lane) {
        if (lane == 0) dot[row] = total;
      });
  }
};

}  // namespace moegraft::kernels::cuda
