#include "block_product.h"

#include <ATen/native/CPUBlas.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <bit>
#include <cstdlib>
#include <vector>

#include "amx.h"
#include "avx512.h"

namespace moegraft::kernels {
namespace {

void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const bf16* a, const bf16* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(b), c, true);
}
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
}

// The micro-kernel has no public question "are you there?" for float32, so it is asked to work.
template <class T>
bool probe() {
  if (sizeof(T) == 2 && !at::native::cpublas::could_pack(at::kBFloat16)) return false;
  try {
    std::vector<T> a(16 * 16), b(16 * 16);
    std::vector<float> c(16 * 16);
    const std::vector<float> ones(16 * 16, 1.0f);
    loops<T>().from_float(ones.data(), 1.0f, a.data(), 16 * 16);
    loops<T>().from_float(ones.data(), 1.0f, b.data(), 16 * 16);
    brgemm(16, 16, 16, 16, 16, 16, false, a.data(), b.data(), c.data());
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
    return c.front() == 16.0f && c.back() == 16.0f;
  } catch (const std::exception&) {
    return false;
  }
}

bool chosen(const char* path) {
  const char* value = std::getenv("MOEGRAFT_CPU_PATH");
  return value && std::strcmp(value, path) == 0;
}

// Whether the CPU has AMX for bf16, and the kernel lets this process use it: tiles are state that a process must ask for.
bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!amx::built() || &loops<bf16>() != &v4_bf16::kBf16Loops || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return (d & kBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

template <class T>
bool own_kernel() {
  static const bool allowed = !chosen("portable") && !chosen("library");
  static const bool yes = allowed && (sizeof(T) == 2 ? amx_granted() : avx512::built() && &loops<float>() != &v3::kFloatLoops);
  return yes;
}

// The own kernels, by element type.
void own_product(int64_t m, const PanelTerm<bf16>* terms, int64_t count, int64_t width, float* c, int64_t ldc, bool accumulate, const Ahead& next) {
  amx::product(m, terms, count, width, c, ldc, accumulate, next);
}
void own_product(int64_t m, const PanelTerm<float>* terms, int64_t count, int64_t width, float* c, int64_t ldc, bool accumulate, const Ahead& next) {
  avx512::product(m, terms, count, width, c, ldc, width, accumulate, next);
}
void own_product_rounded(int64_t m, const PanelTerm<bf16>* terms, int64_t count, int64_t width, bf16* out, int64_t ld_out, int64_t columns, const Ahead& next, bool past_cache) {
  amx::product_rounded(m, terms, count, width, out, ld_out, columns, past_cache, next);
}
void own_product_rounded(int64_t m, const PanelTerm<float>* terms, int64_t count, int64_t width, float* out, int64_t ld_out, int64_t columns, const Ahead& next, bool) {
  avx512::product(m, terms, count, width, out, ld_out, columns, false, next);
}

constexpr int64_t kMostTerms = amx::kMostTerms;
template <class T>
std::array<PanelTerm<T>, kMostTerms> as_list(const Term<T>* terms, int64_t count) {
  std::array<PanelTerm<T>, kMostTerms> list;
  for (int64_t i = 0; i < count; ++i) list[i] = {terms[i].a, terms[i].lda, terms[i].b->panel(terms[i].j), terms[i].b->depth()};
  return list;
}

// Rows of one call of the library: it makes a kernel for every shape that it meets.
int64_t library_rows(int64_t left) {
  return left >= kBlock ? kBlock : left >= 64 ? 64 : left >= 32 ? 32 : int64_t(std::bit_ceil(uint64_t(left)));
}

template <class T, class Pack>
Panels<T> pack_panels(int64_t k, int64_t n, T* out, const Pack& pack) {
  const Panels<T> panels{out, k, n};
  for (int64_t j = 0; j < panels.count(); ++j) pack(j, panels.columns(j), out + j * kPanel * panels.depth(), panels.depth(), panels.width(j));
  return panels;
}

}  // namespace

bool has_block_products(at::ScalarType dtype) {
  static const bool allowed = !chosen("portable"), for_float = allowed && (own_kernel<float>() || probe<float>()), for_bf16 = allowed && (own_kernel<bf16>() || probe<bf16>());
  return dtype == at::kFloat ? for_float : dtype == at::kBFloat16 ? for_bf16 : false;
}
bool has_own_kernel(at::ScalarType dtype) { return dtype == at::kBFloat16 ? own_kernel<bf16>() : dtype == at::kFloat && own_kernel<float>(); }
int64_t block_rows(at::ScalarType dtype) { return dtype == at::kFloat && has_own_kernel(dtype) ? 64 : kBlock; }

template <class T>
Panels<T> pack_transposed(const T* w, int64_t ld, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) { loops<T>().pack_nk(w + j * kPanel * ld, ld, k, columns, panel, depth, width); });
}
template <class T>
Panels<T> pack_plain(const T* w, int64_t ld, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) { loops<T>().pack_kn(w + j * kPanel, ld, k, columns, panel, depth, width); });
}

template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, int64_t j, float* c, int64_t ldc, bool accumulate, const Ahead& next) {
  const int64_t width = b.width(j), depth = b.depth();
  if (own_kernel<T>()) {
    const PanelTerm<T> term{a, lda, b.panel(j), depth};
    return own_product(m, &term, 1, width, c, ldc, accumulate, next);
  }
  if constexpr (sizeof(T) == 2) fetch(next);
  for (int64_t begin = 0; begin < m;) {
    const int64_t rows = library_rows(m - begin);
    brgemm(rows, width, depth, lda, width, ldc, accumulate, a + begin * lda, b.panel(j), c + begin * ldc);
    begin += rows;
  }
}
template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < b.count(); ++j) {
    product(m, a, lda, b, j, c + j * kPanel, ldc, accumulate, ahead(panel_range(b, j + 1)));
  }
}

void fetch(const Ahead& ahead) {
  for (int i = 0; i < ahead.count; ++i) fetch(static_cast<const char*>(ahead.of[i].at), ahead.of[i].bytes);
}

template <class T>
void sum_of_products(int64_t m, const Term<T>* terms, int64_t count, float* c, int64_t ldc, const Ahead& next) {
  const int64_t width = terms->b->width(terms->j);
  if (own_kernel<T>() && count <= kMostTerms) return own_product(m, as_list(terms, count).data(), count, width, c, ldc, false, next);
  if constexpr (sizeof(T) == 2) fetch(next);
  for (int64_t i = 0; i < count; ++i) product(m, terms[i].a, terms[i].lda, *terms[i].b, terms[i].j, c, ldc, i > 0);
}
template <class T>
void sum_of_products(int64_t m, const Term<T>* terms, int64_t count, T* out, int64_t ld_out, int64_t columns, float* room, const Ahead& next, bool past_cache) {
  const int64_t width = terms->b->width(terms->j);
  if (own_kernel<T>() && count <= kMostTerms) return own_product_rounded(m, as_list(terms, count).data(), count, width, out, ld_out, columns, next, past_cache);
  for (int64_t r = 0; r < m; r += kBlock) {
    const int64_t rows = std::min(kBlock, m - r);
    for (int i = 0; sizeof(T) == 2 && i < next.count; ++i) {  // a share for each block
      const int64_t from = next.of[i].bytes * r / m, to = next.of[i].bytes * std::min(m, r + kBlock) / m;
      fetch(static_cast<const char*>(next.of[i].at) + from, to - from);
    }
    for (int64_t i = 0; i < count; ++i) product(rows, terms[i].a + r * terms[i].lda, terms[i].lda, *terms[i].b, terms[i].j, room, width, i > 0);
    loops<T>().round_rows(room, width, out + r * ld_out, ld_out, rows, columns);
  }
}

template <class T>
bool outer_product(int64_t rows, const T* t, int64_t ldt, const float* s, int64_t columns, T* in, int64_t ld, int64_t width, float* acc, int64_t ld_acc, bool accumulate) {
  if constexpr (sizeof(T) == 2)
    if (own_kernel<T>() && width % 2 == 0) {
      for (int64_t r = rows; r < padded_rows(rows); ++r) std::fill_n(in + r * ld, width, T{});
      amx::outer(rows, t, ldt, s, columns, in, ld, width, acc, ld_acc, accumulate);
      return true;
    }
  if constexpr (sizeof(T) == 4)
    if (own_kernel<T>()) {
      avx512::outer(rows, t, ldt, s, columns, in, ld, width, acc, ld_acc, accumulate);
      return true;
    }
  return false;
}

void release_tiles() {
  if (own_kernel<bf16>()) amx::release();
  else at::native::cpublas::brgemm_release(true);
}

namespace {
constexpr size_t kSlab = size_t{16} << 20, kAlign = 64;
struct Arena {
  std::vector<std::pair<std::unique_ptr<std::byte[]>, size_t>> slabs;
  size_t slab = 0, offset = 0;
  int depth = 0;
};
Arena& arena() {
  thread_local Arena a;
  return a;
}
}  // namespace

Scratch::Scratch() {
  Arena& a = arena();
  TORCH_INTERNAL_ASSERT(a.depth == 0, "one Scratch per thread at a time");
  ++a.depth;
  a.slab = a.offset = 0;
}
Scratch::~Scratch() { --arena().depth; }

void* Scratch::take_bytes(int64_t count) {
  Arena& a = arena();
  const size_t bytes = (size_t(std::max<int64_t>(count, 1)) + kAlign - 1) / kAlign * kAlign;
  while (true) {
    if (a.slab == a.slabs.size()) {
      const size_t size = std::max(kSlab, bytes + kAlign);
      a.slabs.emplace_back(std::unique_ptr<std::byte[]>(new std::byte[size]), size);
      a.offset = 0;
    }
    auto& [memory, size] = a.slabs[a.slab];
    const size_t start = (reinterpret_cast<size_t>(memory.get()) + a.offset + kAlign - 1) / kAlign * kAlign - reinterpret_cast<size_t>(memory.get());
    if (start + bytes <= size) {
      a.offset = start + bytes;
      return memory.get() + start;
    }
    ++a.slab;
    a.offset = 0;
  }
}

#define MOEGRAFT_INSTANTIATE(T)                                                                            \
  template Panels<T> pack_transposed(const T*, int64_t, int64_t, int64_t, T*);                              \
  template Panels<T> pack_plain(const T*, int64_t, int64_t, int64_t, T*);                                   \
  template bool outer_product(int64_t, const T*, int64_t, const float*, int64_t, T*, int64_t, int64_t, float*, int64_t, bool); \
  template void sum_of_products(int64_t, const Term<T>*, int64_t, float*, int64_t, const Ahead&);           \
  template void sum_of_products(int64_t, const Term<T>*, int64_t, T*, int64_t, int64_t, float*, const Ahead&, bool); \
  template void product(int64_t, const T*, int64_t, const Panels<T>&, int64_t, float*, int64_t, bool, const Ahead&); \
  template void product(int64_t, const T*, int64_t, const Panels<T>&, float*, int64_t, bool);
MOEGRAFT_INSTANTIATE(float)
MOEGRAFT_INSTANTIATE(bf16)
#undef MOEGRAFT_INSTANTIATE

}  // namespace moegraft::kernels
