#include "launch_case.h"

#include "kernels/cuda/dispatch_kernels.h"
#include "kernels/cuda/row_kernels.h"
#include "kernels/cuda/sequence_kernels.h"
#include "kernels/cuda/swiglu_kernels.h"

namespace moegraft::kernels::cuda {

// The counting sort as ops_body.h runs it: its three kernels, and the scan between them.
struct DispatchCase {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    for (const int64_t G : {1, 2}) {
      const int64_t groups = G, E = 16, K = 8, slots = tokens * K, buckets = E * G,
                    chunks = std::max<int64_t>(1, (slots + kSortChunk - 1) / kSortChunk);
      const int64_t* ids = a.fill<int64_t>(slots, [&](int64_t i) {
        return i % 5 == 3 ? -1 : i % 3 == 0 ? 1 : a.below(E + 1);
      });  // one expert of many rows, slots without one, an id too large
      const int64_t* group = G == 1 ? nullptr : a.fill<int64_t>(tokens, [&](int64_t) { return a.below(groups); });
      int32_t *bucket = a.empty<int32_t>(slots),
              *counts = a.fill<int32_t>((buckets + 1) * chunks, [](int64_t) { return 0; });
      Run::threads(CountSlots{ids, group, K, E, G, chunks, bucket, counts}, slots);
      int32_t total = 0;
      const int32_t* ends = a.fill<int32_t>((buckets + 1) * chunks, [&](int64_t i) { return total += counts[i]; });
      int32_t* offsets = a.empty<int32_t>(buckets + 1);
      Run::threads(BucketOffsets{ends, chunks, offsets}, buckets + 1);
      Run::threads(PlaceSlots{bucket, counts, ends, K, chunks, buckets, a.empty<int32_t>(offsets[buckets]),
                              a.empty<int32_t>(slots)},
                   slots);
    }
  }
};
template <>
struct Case<CountSlots> : DispatchCase {};
template <>
struct Case<BucketOffsets> : DispatchCase {};
template <>
struct Case<PlaceSlots> : DispatchCase {};

// Rows of slots in a mixed order; every fifth slot has none.
struct Slots {
  static constexpr int64_t kTopK = 5;
  int64_t slots, rows;
  const int32_t* row_of_slot;
  Slots(Arrays& a, int64_t tokens) : slots(tokens * kTopK), rows(tokens * (kTopK - 1)) {
    std::vector<int32_t> order(size_t(rows), 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t other = a.below(r + 1);
      order[size_t(r)] = order[size_t(other)];
      order[size_t(other)] = int32_t(r);
    }
    row_of_slot = a.fill<int32_t>(slots, [&](int64_t i) {
      return i % kTopK == 2 ? -1 : order[size_t(i / kTopK * (kTopK - 1) + i % kTopK - (i % kTopK > 2))];
    });
  }
};
template <>
struct Case<SlotsToRows> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    const Slots s(a, tokens);
    Run::threads(SlotsToRows{a.random<float>(s.slots), s.row_of_slot, a.empty<float>(s.rows)}, s.slots);
  }
};
template <>
struct Case<RowsToSlots> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    const Slots s(a, tokens);
    Run::threads(RowsToSlots{a.random<float>(s.rows), s.row_of_slot, a.empty<float>(s.slots)}, s.slots);
  }
};

// Ends of buckets of any size, empty ones too.
inline const int32_t* make_offsets(Arrays& a, int64_t rows, int64_t buckets) {
  return a.fill<int32_t>(buckets + 1, [&](int64_t b) {
    return rows * (b % 3 == 1 && b < buckets ? b - 1 : b) / std::max<int64_t>(buckets, 1);
  });
}
inline const uint32_t* make_row_bits(Arrays& a, int64_t rows) {
  return a.fill<uint32_t>(rows, [&](int64_t) { return a.below(4); });
}

template <>
struct Case<RowBits> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    const int64_t rows = tokens * 5;
    RowBits f{make_offsets(a, rows, 24), 24, 3, {1u, 6u, 9u}, a.empty<uint32_t>(rows)};
    Run::threads(f, rows);
  }
};

template <class T>
struct Case<GateThin<T>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    const int64_t columns = 8, ld_from = 24, ld_to = 16;
    const uint32_t* bits = make_row_bits(a, rows);
    const float* weights = a.random<float>(rows);
    const T* from = a.random<T>(rows * ld_from);
    Run::threads(GateThin<T>{from, ld_from, a.empty<T>(rows * ld_to), nullptr, ld_to, bits, 1, nullptr, columns},
                 rows * columns);
    Run::threads(GateThin<T>{from, ld_from, nullptr, a.empty<T>(rows * ld_to), ld_to, bits, 2, weights, columns},
                 rows * columns);
    T* both = a.random<T>(rows * ld_to);
    Run::threads(GateThin<T>{both, ld_to, both, a.empty<T>(rows * ld_to), ld_to, bits, 3, weights, columns},
                 rows * columns);
  }
};

template <class TFrom, class TTo, int V>
struct Case<FactorGradient<TFrom, TTo, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t experts) {
    const int64_t m = 5, n = 3 * V, stride_m = 4 * V, stride_e = m * stride_m + 8, groups = 2;
    Run::threads(FactorGradient<TFrom, TTo, V>{a.random<TFrom>(experts * stride_e), stride_e, stride_m,
                                               a.empty<TTo>(experts * m * n), m, n, groups,
                                               make_offsets(a, experts, experts * groups), 1.5f},
                 experts * m * (n / V));
  }
};

template <class T, int V>
struct Case<GatherRows<T, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    const int64_t D = 5 * V, tokens = 9;
    Run::threads(
        GatherRows<T, V>{a.random<T>(tokens * D), a.fill<int32_t>(rows, [&](int64_t) { return a.below(tokens); }),
                         a.empty<T>(rows * D), D},
        rows * (D / V));
  }
};

// `bucket` sequences and one more; of those there are some are empty.
template <>
struct Case<SequenceOffsets> {
  template <class Run>
  static void run(Arrays& a, int64_t bucket) {
    const int64_t sequences = bucket / 2;
    const auto lengths = [&](int64_t most) {
      int64_t end = 0;
      return a.fill<int32_t>(sequences + 1, [&](int64_t i) { return end += i * 3 % most; });
    };
    Run::threads(SequenceOffsets{lengths(7), lengths(11), sequences, bucket, 24, 8, 3, a.empty<int32_t>(bucket),
                                 a.empty<int32_t>(bucket), a.empty<int32_t>(bucket + 1), a.empty<int32_t>(bucket + 1),
                                 a.empty<int32_t>(bucket + 1)},
                 bucket + 1);
  }
};

template <class T, int V>
struct Case<AddRows<T, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    const int64_t D = 5 * V;  // each place at most once
    Run::threads(
        AddRows<T, V>{a.random<T>(rows * D), a.fill<int64_t>(rows, [&](int64_t r) { return 2 * (rows - 1 - r); }),
                      a.random<T>(2 * rows * D), D, 1.5f},
        rows * (D / V));
  }
};

template <class T, int V>
struct Case<CombineRows<T, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    const int64_t D = 5 * V;
    const Slots s(a, tokens);
    for (const bool all : {false, true})
      Run::threads(CombineRows<T, V>{a.random<T>(s.rows * D), all ? a.random<T>(s.rows * D) : nullptr,
                                     all ? a.random<T>(s.rows * D) : nullptr, all ? make_row_bits(a, s.rows) : nullptr,
                                     1, all ? a.random<float>(s.slots) : nullptr, s.row_of_slot, a.empty<T>(tokens * D),
                                     D, Slots::kTopK},
                   tokens * (D / V));
  }
};

template <class T, int V>
struct Case<SwigluForward<T, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    const int64_t F = 5 * V, ld = 2 * F;  // gate and up in one product's rows
    for (const bool terms : {false, true}) {
      T* gu = a.random<T>(rows * ld, 2);
      Run::threads(SwigluForward<T, V>{gu, gu + F, ld, ld, terms ? a.random<T>(rows * F) : nullptr,
                                       terms ? a.random<T>(rows * F) : nullptr, F,
                                       terms ? make_row_bits(a, rows) : nullptr, 1, 2, a.empty<T>(rows * F), F},
                   rows * (F / V));
    }
  }
};

template <class T, int V>
struct Case<SwigluBackward<T, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    for (const int64_t F : {V, 45 * V})
      for (const bool all : {false, true}) {
        const int64_t ld = 2 * F;
        const T* gu = a.random<T>(rows * ld, 2);
        T* out = a.empty<T>(rows * ld);
        Run::rows(SwigluBackward<T, V>{a.random<T>(rows * F), all ? a.random<T>(rows * F) : nullptr,
                                       all ? make_row_bits(a, rows) : nullptr, 2, gu, gu + F, ld, ld,
                                       all ? a.random<float>(rows) : nullptr, out, out + F, ld,
                                       all ? a.empty<T>(rows * F) : nullptr, all ? a.empty<float>(rows) : nullptr, F},
                  rows);
      }
  }
};

}  // namespace moegraft::kernels::cuda

#include "kernels/cuda/moe_kernels.cu"
