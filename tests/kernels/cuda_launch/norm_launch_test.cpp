#include "launch_case.h"

#include "kernels/cuda/norm_kernels.h"

namespace moegraft::kernels::cuda {

// One step of a warp, and several with a rest.
template <int V>
constexpr int64_t kWidths[] = {V, V * 45};

template <class TX, class TW, class TY, int V>
struct Case<RmsNormForward<TX, TW, TY, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    for (const int64_t D : kWidths<V>)
      for (const bool residual : {false, true})
        Run::rows(RmsNormForward<TX, TW, TY, V>{a.random<TX>(rows * D), residual ? a.random<TY>(rows * D) : nullptr,
                                                a.random<TW>(D), residual ? a.empty<TX>(rows * D) : nullptr,
                                                a.empty<TY>(rows * D), residual ? a.empty<float>(rows * D) : nullptr,
                                                a.empty<float>(rows), D, 1e-6f},
                  rows);
  }
};

template <class TX, class TW, class TY, int V>
struct Case<RmsNormBackward<TX, TW, TY, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    for (const int64_t D : kWidths<V>)
      for (const int given : {1, 2, 7})  // gradients of y, of y_wide, of the sum
        Run::rows(RmsNormBackward<TX, TW, TY, V>{given & 1 ? a.random<TY>(rows * D) : nullptr,
                                                 given & 2 ? a.random<float>(rows * D) : nullptr,
                                                 given & 4 ? a.random<TX>(rows * D) : nullptr, a.random<TX>(rows * D),
                                                 a.random<TW>(D), a.random<float>(rows), a.empty<TX>(rows * D), D},
                  rows);
  }
};

template <class TX, class TY>
struct Case<RmsNormWeightPartial<TX, TY>> {
  template <class Run>
  static void run(Arrays& a, int64_t rows) {
    const int64_t D = 150, chunks = (rows + kNormRows - 1) / kNormRows;
    for (const bool both : {false, true})
      Run::threads(RmsNormWeightPartial<TX, TY>{a.random<TY>(rows * D), both ? a.random<float>(rows * D) : nullptr,
                                                a.random<TX>(rows * D), a.random<float>(rows),
                                                a.empty<float>(chunks * D), rows, D},
                   chunks * D);
  }
};

template <class TW>
struct Case<SumChunks<TW>> {
  template <class Run>
  static void run(Arrays& a, int64_t chunks) {
    const int64_t D = 300;
    Run::threads(SumChunks<TW>{a.random<float>(chunks * D), chunks, D, a.empty<TW>(D)}, D);
  }
};

template <class T, int V>
struct Case<Rotate<T, V>> {
  template <class Run>
  static void run(Arrays& a, int64_t tokens) {
    const int64_t heads = 3, half = 3 * V, width = 2 * half,
                  stride = 2 * heads * width;  // heads out of a joint projection's rows
    for (const float sign : {1.0f, -1.0f})
      Run::threads(Rotate<T, V>{a.random<T>(tokens * stride), stride, a.random<float>(tokens * half),
                                a.random<float>(tokens * half), a.empty<T>(tokens * heads * width), heads, width, sign},
                   tokens * heads * (half / V));
  }
};

}  // namespace moegraft::kernels::cuda

#include "kernels/cuda/norm_kernels.cu"
