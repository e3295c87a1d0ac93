#pragma once
// Small matrix products of CPU paths: C[m, n] (+)= A[m, k] B[k, n] on one block of 128 rows and one panel of 64 columns
// of B at a time, float32 sums. The inner kernel is one for the instruction set (micro_kernel.h); what surrounds a
// block (gathering rows, SwiGLU, rounding) happens while it is in the first-level cache. Frozen operands are laid out
// as panels once.
//
// Panel: [k/pair][n][pair] with pair = 2 for bf16 (whose instructions read pairs along k) and 1 for float32; n is at
// most 64 and padded to 16, k to the pair. The order of sums depends on k and the panels alone, so a row's bits do not
// depend on the rows beside it.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "libtorch.h"
#include "loops.h"
#include "micro_kernel.h"

namespace moegraft::kernels {

// Element types of the loops and of ATen share their bits.
template <class T>
constexpr at::ScalarType kTypeOf = sizeof(T) == 2 ? at::kBFloat16 : at::kFloat;
template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
constexpr int64_t kPanel = 64, kBlock = 128;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T>
constexpr int64_t padded_depth(int64_t k) {
  return round_up(k, kPair<T>);
}
constexpr int64_t padded_width(int64_t n) { return round_up(n, 16); }
// Rows that a product of `rows` rows may touch.
constexpr int64_t padded_rows(int64_t rows) { return round_up(rows, 16); }

// Whether this process has a micro-kernel for a dtype.
bool has_block_products(at::ScalarType dtype);

struct BlockFormat;
template <class T>
struct Panels;

// Panel j of a stored operand, in this thread's memory: made anew unless it is one of the last kMadePanels of the
// running task (Scratch). Two rows of panels that a product reads at a time (gate and up, a sum's terms) so stay for
// all its blocks of rows.
constexpr int kMadePanels = 4;
template <class T>
const T* make_panel(const Panels<T>& b, int64_t j);
// The bytes that panel j is made of, where they lie together.
template <class T>
Range stored_range(const Panels<T>& b, int64_t j, int64_t part, int64_t parts);

// A stored operand whose panels are made when they are read: dequantised, turned (B is its transpose), or both.
struct StoredOperand {
  const void* data = nullptr;           // its panels; null: none, Panels::data is what products read
  const BlockFormat* format = nullptr;  // of its panels (formats/formats.h); null: elements of T
  int64_t k = 0, n = 0;                 // its own depth and width
  bool turned = false;
};

// A B operand as panels, lying in memory that somebody else owns.
template <class T>
struct Panels {
  const T* data = nullptr;
  int64_t k = 0, n = 0;
  int64_t stride = 0;  // elements from panel to panel; 0: they follow each other
  int64_t first = 0;   // row of B that is row 0 here
  StoredOperand stored = {};

  int64_t depth() const { return padded_depth<T>(k); }
  int64_t count() const { return (n + kPanel - 1) / kPanel; }
  int64_t columns(int64_t j) const { return std::min(kPanel, n - j * kPanel); }  // real ones
  int64_t width(int64_t j) const { return padded_width(columns(j)); }            // laid out
  const T* panel(int64_t j) const {
    return stored.data ? make_panel(*this, j) : data + j * (stride ? stride : kPanel * depth()) + first * width(j);
  }
  // Rows [begin, begin + count) of B, begin a multiple of the pair; of a stored operand, of kPanel.
  Panels depth_range(int64_t begin, int64_t count) const {
    return {data, count, n, stride ? stride : kPanel * depth(), first + begin, stored};
  }
  static int64_t elements(int64_t k, int64_t n) { return padded_depth<T>(k) * padded_width(n); }
};

// Asks for cache lines ahead of their use.
template <class T>
void fetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// A part of panel j, to come from memory while the panel before it is worked on: with few rows an expert, weights are
// read at the pace of the products.
template <class T>
Range panel_range(const Panels<T>& b, int64_t j, int64_t part = 0, int64_t parts = 1) {
  if (j >= b.count()) return {};
  if (b.stored.data) return stored_range(b, j, part, parts);
  const int64_t size = b.depth() * b.width(j), share = round_up((size + parts - 1) / parts, 64 / int64_t(sizeof(T))),
                begin = part * share;
  return {b.panel(j) + begin, std::min(share, size - begin) * int64_t(sizeof(T))};
}
template <class T>
Range range(const T* p, int64_t count) {
  return {p, count * int64_t(sizeof(T))};
}
template <class... R>
Ahead ahead(const R&... ranges) {
  Ahead a;
  (a.add(ranges), ...);
  return a;
}

// From W [n, k] (y = x W^T) or W [k, n] (dx = dy W), both row-major with leading dimension ld. out:
// Panels<T>::elements(k, n).
template <class T>
Panels<T> pack_transposed(const T* w_nk, int64_t ld, int64_t k, int64_t n, T* out);
template <class T>
Panels<T> pack_plain(const T* w_kn, int64_t ld, int64_t k, int64_t n, T* out);
// Panel j of `rows` rows [*, b.n], b's depth padded with zeros, and all of them.
template <class T>
void pack_panel(const T* in, int64_t ld, int64_t rows, const Panels<T>& b, int64_t j, T* out) {
  loops<T>().pack_kn(in + j * kPanel, ld, rows, b.columns(j), out + j * kPanel * b.depth(), b.depth(), b.width(j));
}
template <class T>
Panels<T> pack_rows_deep(const T* in, int64_t ld, int64_t rows, int64_t n, int64_t depth, T* out) {
  const Panels<T> b{out, depth, n};
  for (int64_t j = 0; j < b.count(); ++j) pack_panel(in, ld, rows, b, j, out);
  return b;
}

// C [m, width(j)] (+)= A [m, depth] panel_j for any m; A and C must have padded_rows(m) rows, A's columns up to depth()
// must be finite in the first m.
template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, int64_t j, float* c, int64_t ldc, bool accumulate,
             const Ahead& next = {});
// The same over all panels: C [m, padded_width(n)].
template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, float* c, int64_t ldc, bool accumulate);

// One product of a sum: A [m, depth] times panel j.
template <class T>
struct Term {
  const T* a;
  int64_t lda;
  const Panels<T>* b;
  int64_t j;
};
// C [m, width] (+)= the sum of the products, and the same rounded to T: there exactly [m, columns] is written (past the
// cache on request: large results). room: kBlock x kPanel floats.
template <class T>
void sum_of_products(int64_t m, const Term<T>* terms, int64_t count, float* c, int64_t ldc, const Ahead& next = {});
template <class T>
void sum_of_products(int64_t m, const Term<T>* terms, int64_t count, T* out, int64_t ld_out, int64_t columns,
                     float* room, const Ahead& next = {}, bool past_cache = false);

// acc [columns, width] (+)= (s t)^T in, `in` [rows, width] with padded_rows(rows) rows: in bf16, those beyond `rows`
// are cleared. columns a multiple of 16; s null: ones.
template <class T>
void outer_product(int64_t rows, const T* t, int64_t ldt, const float* s, int64_t columns, T* in, int64_t ld,
                   int64_t width, float* acc, int64_t ld_acc, bool accumulate);

// A row of `width` elements as one of a left operand: zeros up to the pair.
template <class T>
void copy_row(const T* in, int64_t width, T* out) {
  std::memcpy(out, in, size_t(width) * sizeof(T));
  if (width < padded_depth<T>(width)) out[width] = T{};
}
template <class T>
void copy_rows(const T* in, int64_t ld, int64_t rows, int64_t width, T* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; ++r) copy_row(in + r * ld, width, out + r * ld_out);
}
// Leading dimension of a copied left operand. Tiles want it off the powers of two, which would put their rows into few
// sets of the cache.
template <class T>
constexpr int64_t copied_depth(int64_t k) {
  return sizeof(T) == 2 ? round_up(k, 32) + 32 : round_up(k, kPanel);
}

// Memory that a thread keeps from call to call, so that no step faults pages in. take() is valid until the Scratch
// dies; uninitialised.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * int64_t(sizeof(T))));
  }

 private:
  void* take_bytes(int64_t bytes);
};

void release_tiles();  // gives AMX's state back, where that was used

// Runs f(task, scratch) for task in [0, count) on all threads, whoever is free taking the next. Results must not depend
// on who runs what.
template <class F>
void for_each_task(int64_t count, const F& f) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      Scratch scratch;
      f(task, scratch);
    }
    release_tiles();
  });
}

}  // namespace moegraft::kernels
