#pragma once
// RMSNorm (with the residual sum before it, when given) and the rotary embedding.

#include "team.h"

namespace moegraft::kernels::cuda {

// One warp per row: sum = x + delta (delta null: x itself, nothing written), y = w * sum / sqrt(mean(sum^2) + eps).
// Statistics in float32; under a bf16 x the normalised value is rounded before the weight, as the reference models do.
// y_wide (null: not wanted): the same y in float32.
template <class TX, class TW, class TY, int V>
struct RmsNormForward {
  static constexpr int kLanes = 32;
  const TX* x;
  const TY* delta;
  const TW* w;
  TX* sum;
  TY* y;
  float *y_wide, *rstd;
  int64_t width;
  float eps;

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t row, const Team& team) const {
    const int64_t begin = row * width;
    const float squares = team.sum([&](int lane) {
      float part = 0;
      for (int64_t j = int64_t(lane) * V; j < width; j += int64_t(kLanes) * V) {
        float a[V];
        load<V>(x + begin + j, a);
        if (delta) {
          add<V>(delta + begin + j, a);
          store<V>(a, sum + begin + j);
        }
        for (int v = 0; v < V; ++v) {
          const float rounded = static_cast<float>(static_cast<TX>(a[v]));
          part += rounded * rounded;
        }
      }
      return part;
    });
    const float inverse = 1.0f / sqrtf(squares / float(width) + eps);
    const TX* normed = delta ? sum : x;
    team.each([&](int lane) {
      for (int64_t j = int64_t(lane) * V; j < width; j += int64_t(kLanes) * V) {
        float a[V], b[V];
        load<V>(normed + begin + j, a);
        load<V>(w + j, b);
        for (int v = 0; v < V; ++v) a[v] = b[v] * static_cast<float>(static_cast<TX>(a[v] * inverse));
        store<V>(a, y + begin + j);
        if (y_wide) store<V>(a, y_wide + begin + j);
      }
      if (lane == 0) rstd[row] = inverse;
    });
  }
};

// One warp per row: the gradient of what was normalised. dy and dy_wide: gradients of y and y_wide, either may be null;
// dsum (null: none): what flows into the sum beside the norm.
template <class TX, class TW, class TY, int V>
struct RmsNormBackward {
  static constexpr int kLanes = 32;
  const TY* dy;
  const float* dy_wide;
  const TX *dsum, *x;
  const TW* w;
  const float* rstd;
  TX* dx;
  int64_t width;

  MOEGRAFT_HD void gradient(int64_t at, float (&d)[V]) const {
    for (int v = 0; v < V; ++v) d[v] = 0;
    if (dy) add<V>(dy + at, d);
    if (dy_wide) add<V>(dy_wide + at, d);
  }

  template <class Team>
  MOEGRAFT_HD void operator()(int64_t row, const Team& team) const {
    const int64_t begin = row * width;
    const float dot = team.sum([&](int lane) {
      float part = 0;
      for (int64_t j = int64_t(lane) * V; j < width; j += int64_t(kLanes) * V) {
        float a[V], b[V], d[V];
        load<V>(x + begin + j, a);
        load<V>(w + j, b);
        gradient(begin + j, d);
        for (int v = 0; v < V; ++v) part += d[v] * b[v] * a[v];
      }
      return part;
    });
    const float s = rstd[row], coefficient = dot * s * s * s / float(width);
    team.each([&](int lane) {
      for (int64_t j = int64_t(lane) * V; j < width; j += int64_t(kLanes) * V) {
        float a[V], b[V], d[V];
        load<V>(x + begin + j, a);
        load<V>(w + j, b);
        gradient(begin + j, d);
        for (int v = 0; v < V; ++v) a[v] = s * b[v] * d[v] - coefficient * a[v];
        if (dsum) add<V>(dsum + begin + j, a);
        store<V>(a, dx + begin + j);
      }
    });
  }
};

constexpr int64_t kNormRows = 64;  // rows that one partial sum of a weight's gradient covers

// One thread per (chunk of rows, column): partial [chunks, width].
template <class TX, class TY>
struct RmsNormWeightPartial {
  const TY* dy;
  const float* dy_wide;
  const TX* x;
  const float* rstd;
  float* partial;
  int64_t rows, width;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t chunk = i / width, column = i % width;
    const int64_t end = (chunk + 1) * kNormRows < rows ? (chunk + 1) * kNormRows : rows;
    float total = 0;
    for (int64_t row = chunk * kNormRows; row < end; ++row) {
      const int64_t at = row * width + column;
      const float d = (dy ? static_cast<float>(dy[at]) : 0.0f) + (dy_wide ? dy_wide[at] : 0.0f);
      total += d * static_cast<float>(x[at]) * rstd[row];
    }
    partial[i] = total;
  }
};

// One thread per column: the chunks in their order.
template <class TW>
struct SumChunks {
  const float* partial;
  int64_t chunks, width;
  TW* out;

  MOEGRAFT_HD void operator()(int64_t column) const {
    float total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[c * width + column];
    out[column] = static_cast<TW>(total);
  }
};

// One thread per (token, head, V pairs): (a, b) -> (a cos - b sin, b cos + a sin), b half a head after a. sign -1: the
// inverse, which is the backward. x rows may be strided per token (a slice of a joint projection); y is contiguous.
template <class T, int V>
struct Rotate {
  const T* x;
  int64_t x_token_stride;
  const float *cos, *sin;
  T* y;
  int64_t heads, head_width;
  float sign;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t half = head_width / 2, packs = half / V, pack = i % packs, head = i / packs % heads,
                  token = i / packs / heads, j = pack * V;
    float a[V], b[V], c[V], s[V], p[V], q[V];
    const T* in = x + token * x_token_stride + head * head_width + j;
    load<V>(in, a);
    load<V>(in + half, b);
    load<V>(cos + token * half + j, c);
    load<V>(sin + token * half + j, s);
    for (int v = 0; v < V; ++v) {
      const float turned = sign * s[v];
      p[v] = a[v] * c[v] - b[v] * turned;
      q[v] = b[v] * c[v] + a[v] * turned;
    }
    T* out = y + (token * heads + head) * head_width + j;
    store<V>(p, out);
    store<V>(q, out + half);
  }
};

}  // namespace moegraft::kernels::cuda
