#include "block_product.h"

#include <ATen/native/CPUBlas.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <vector>

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

bool portable() {
  const char* path = std::getenv("MOEGRAFT_CPU_PATH");
  return path && std::strcmp(path, "portable") == 0;
}

template <class T, class Pack>
Panels<T> pack_panels(int64_t k, int64_t n, T* out, const Pack& pack) {
  const Panels<T> panels{out, k, n};
  for (int64_t j = 0; j < panels.count(); ++j) pack(j, panels.columns(j), out + j * kPanel * panels.depth(), panels.depth(), panels.width(j));
  return panels;
}

}  // namespace

int64_t padded_rows(int64_t rows) {
  const int64_t rest = rows % 32;
  return rows - rest + (rest ? int64_t(std::bit_ceil(uint64_t(rest))) : 0);
}

bool has_block_products(at::ScalarType dtype) {
  static const bool allowed = !portable(), for_float = allowed && probe<float>(), for_bf16 = allowed && probe<bf16>();
  return dtype == at::kFloat ? for_float : dtype == at::kBFloat16 ? for_bf16 : false;
}

template <class T>
Panels<T> pack_transposed(const T* w, int64_t ld, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) { loops<T>().pack_nk(w + j * kPanel * ld, ld, k, columns, panel, depth, width); });
}
template <class T>
Panels<T> pack_plain(const T* w, int64_t ld, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) { loops<T>().pack_kn(w + j * kPanel, ld, k, columns, panel, depth, width); });
}
template <class T>
Panels<T> pack_transposed_float(const float* w, int64_t ld, float factor, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) { loops<T>().pack_nk_float(w + j * kPanel * ld, ld, factor, k, columns, panel, depth, width); });
}
template <class T>
Panels<T> pack_plain_float(const float* w, int64_t ld, float factor, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) { loops<T>().pack_kn_float(w + j * kPanel, ld, factor, k, columns, panel, depth, width); });
}

template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, int64_t j, float* c, int64_t ldc, bool accumulate) {
  const int64_t width = b.width(j), depth = b.depth();
  for (int64_t begin = 0; begin < m;) {
    const int64_t left = m - begin, rows = left >= kBlock ? kBlock : left >= 64 ? 64 : left >= 32 ? 32 : padded_rows(left);
    brgemm(rows, width, depth, lda, width, ldc, accumulate, a + begin * lda, b.panel(j), c + begin * ldc);
    begin += rows;
  }
}
template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < b.count(); ++j) {
    fetch_panel(b, j + 1, 0, 1);
    product(m, a, lda, b, j, c + j * kPanel, ldc, accumulate);
  }
}

void release_tiles() { at::native::cpublas::brgemm_release(true); }

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
  template Panels<T> pack_transposed_float(const float*, int64_t, float, int64_t, int64_t, T*);             \
  template Panels<T> pack_plain_float(const float*, int64_t, float, int64_t, int64_t, T*);                  \
  template void product(int64_t, const T*, int64_t, const Panels<T>&, int64_t, float*, int64_t, bool);      \
  template void product(int64_t, const T*, int64_t, const Panels<T>&, float*, int64_t, bool);
MOEGRAFT_INSTANTIATE(float)
MOEGRAFT_INSTANTIATE(bf16)
#undef MOEGRAFT_INSTANTIATE

}  // namespace moegraft::kernels
