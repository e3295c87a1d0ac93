#pragma once
// Rows in and out of expert order, and the small pieces around thin (low-rank) products.

#include "team.h"

namespace moegraft::kernels::cuda {

// One thread per (row, V columns): to[row] = from[token_of_row[row]].
template <class T, int V>
struct GatherRows {
  const T* from;
  const int32_t* token_of_row;
  T* to;
  int64_t width;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t packs = width / V, row = i / packs, column = i % packs * V;
    *reinterpret_cast<Pack<T, V>*>(to + row * width + column) =
        *reinterpret_cast<const Pack<T, V>*>(from + token_of_row[row] * width + column);
  }
};

// One thread per (row, V columns): to[place_of_row[row]] += factor * from[row], rounded once. No two rows have one
// place.
template <class T, int V>
struct AddRows {
  const T* from;
  const int64_t* place_of_row;
  T* to;
  int64_t width;
  float factor;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t packs = width / V, row = i / packs, column = i % packs * V;
    T* place = to + place_of_row[row] * width + column;
    float value[V], more[V];
    load<V>(place, value);
    load<V>(from + row * width + column, more);
    for (int v = 0; v < V; ++v) value[v] += factor * more[v];
    store<V>(value, place);
  }
};

// One thread per (token, V columns): out[t] = sum_k w[t,k] * (y + y2 + delta)[row(t,k)], in the order of k. y2 and
// delta may be null; delta counts on rows whose bits meet `acting` only, so that other rows keep the very bits of the
// sum without it. weights null: all ones.
template <class T, int V>
struct CombineRows {
  const T *y, *y2, *delta;
  const uint32_t* row_bits;
  uint32_t acting;
  const float* weights;
  const int32_t* row_of_slot;
  T* out;
  int64_t width, top_k;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t packs = width / V, token = i / packs, column = i % packs * V;
    float total[V];
    for (int v = 0; v < V; ++v) total[v] = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t row = row_of_slot[token * top_k + k];
      if (row < 0) continue;
      float value[V];
      load<V>(y + row * width + column, value);
      if (y2) add<V>(y2 + row * width + column, value);
      if (delta && (row_bits[row] & acting)) add<V>(delta + row * width + column, value);
      const float weight = weights ? weights[token * top_k + k] : 1.0f;
      for (int v = 0; v < V; ++v) total[v] += weight * value[v];
    }
    store<V>(total, out + token * width + column);
  }
};

// One thread per slot: a routing weight to its row, and a row's value back to its slot.
struct SlotsToRows {
  const float* slots;
  const int32_t* row_of_slot;
  float* rows;
  MOEGRAFT_HD void operator()(int64_t i) const {
    if (row_of_slot[i] >= 0) rows[row_of_slot[i]] = slots[i];
  }
};
struct RowsToSlots {
  const float* rows;
  const int32_t* row_of_slot;
  float* slots;
  MOEGRAFT_HD void operator()(int64_t i) const { slots[i] = row_of_slot[i] < 0 ? 0.0f : rows[row_of_slot[i]]; }
};

constexpr int kMaxGroups = 16;  // modalities that gates can tell apart on the device
constexpr int kMaxTerms = 32;   // low-rank terms of one layer: one bit each

// One thread per row: the terms that act on the row's group, as bits.
struct RowBits {
  const int32_t* offsets;  // [buckets + 1]
  int32_t buckets, num_groups;
  uint32_t bits_of_group[kMaxGroups];
  uint32_t* row_bits;

  MOEGRAFT_HD void operator()(int64_t row) const {
    int32_t low = 0, high = buckets;  // offsets[low] <= row < offsets[high]
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (offsets[middle] <= row)
        low = middle;
      else
        high = middle;
    }
    const int32_t group = low % num_groups;
    uint32_t bits = 0;
    MOEGRAFT_UNROLL  // an index that varies would put the array into local memory
        for (int32_t g = 0; g < kMaxGroups; ++g) bits = g == group ? bits_of_group[g] : bits;
    row_bits[row] = bits;
  }
};

// One thread per (row, column) of one term's thin product: to = the value where the term acts on the row, exactly zero
// elsewhere; weighted = that times the row's weight. Either may be null; `to` may be `from`.
template <class T>
struct GateThin {
  const T* from;
  int64_t ld_from;
  T *to, *weighted;
  int64_t ld_to;
  const uint32_t* row_bits;
  uint32_t acting;
  const float* row_weights;
  int64_t columns;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t row = i / columns, column = i % columns;
    const float value = (row_bits[row] & acting) ? static_cast<float>(from[row * ld_from + column]) : 0.0f;
    if (to) to[row * ld_to + column] = static_cast<T>(value);
    if (weighted) weighted[row * ld_to + column] = static_cast<T>(value * row_weights[row]);
  }
};

// One thread per V elements of one factor's gradient [E, m, n]: to = factor * from, and exactly zero for an expert
// without rows, whatever the product left there. from has the given strides.
template <class TFrom, class TTo, int V>
struct FactorGradient {
  const TFrom* from;
  int64_t stride_e, stride_m;
  TTo* to;
  int64_t m, n, num_groups;
  const int32_t* offsets;
  float factor;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t packs = n / V, line = i / packs, b = i % packs * V, e = line / m, a = line % m;
    float value[V];
    for (int v = 0; v < V; ++v) value[v] = 0;
    if (offsets[e * num_groups] != offsets[(e + 1) * num_groups]) {
      load<V>(from + e * stride_e + a * stride_m + b, value);
      for (int v = 0; v < V; ++v) value[v] *= factor;
    }
    store<V>(value, to + line * n + b);
  }
};

}  // namespace moegraft::kernels::cuda
