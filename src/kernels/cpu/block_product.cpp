#include "block_product.h"

#include <array>
#include <vector>

#include "../formats/formats.h"
#include "made_panels.h"

namespace moegraft::kernels {
namespace {

template <class T>
PanelTerm<T> as_term(int64_t m, const T* a, int64_t lda, const Panels<T>& b, int64_t j) {
  if (const StoredOperand& s = b.stored;
      s.data && s.format == &kQ8_0 && !s.turned && b.first == 0 && m <= micro_kernel<T>()->few_rows)
    return {a, lda, nullptr, b.depth(), static_cast<const uint8_t*>(stored_panel<T>(s, j))};
  return {a, lda, b.panel(j), b.depth()};
}
template <class T>
std::array<PanelTerm<T>, kMostTerms> as_list(int64_t m, const Term<T>* terms, int64_t count) {
  std::array<PanelTerm<T>, kMostTerms> list;
  for (int64_t i = 0; i < count; ++i) list[i] = as_term(m, terms[i].a, terms[i].lda, *terms[i].b, terms[i].j);
  return list;
}

template <class T, class Pack>
Panels<T> pack_panels(int64_t k, int64_t n, T* out, const Pack& pack) {
  const Panels<T> panels{out, k, n};
  for (int64_t j = 0; j < panels.count(); ++j)
    pack(j, panels.columns(j), out + j * kPanel * panels.depth(), panels.depth(), panels.width(j));
  return panels;
}

}  // namespace

bool has_block_products(at::ScalarType dtype) {
  return dtype == at::kFloat ? micro_kernel<float>() != nullptr
                             : dtype == at::kBFloat16 && micro_kernel<bf16>() != nullptr;
}

template <class T>
Panels<T> pack_transposed(const T* w, int64_t ld, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) {
    loops<T>().pack_nk(w + j * kPanel * ld, ld, k, columns, panel, depth, width);
  });
}
template <class T>
Panels<T> pack_plain(const T* w, int64_t ld, int64_t k, int64_t n, T* out) {
  return pack_panels(k, n, out, [&](int64_t j, int64_t columns, T* panel, int64_t depth, int64_t width) {
    loops<T>().pack_kn(w + j * kPanel, ld, k, columns, panel, depth, width);
  });
}

template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, int64_t j, float* c, int64_t ldc, bool accumulate,
             const Ahead& next) {
  const PanelTerm<T> term = as_term(m, a, lda, b, j);
  micro_kernel<T>()->product(m, &term, 1, b.width(j), c, ldc, accumulate, next);
}
template <class T>
void product(int64_t m, const T* a, int64_t lda, const Panels<T>& b, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < b.count(); ++j)
    product(m, a, lda, b, j, c + j * kPanel, ldc, accumulate, ahead(panel_range(b, j + 1)));
}

template <class T>
void sum_of_products(int64_t m, const Term<T>* terms, int64_t count, float* c, int64_t ldc, const Ahead& next) {
  for (int64_t first = 0; first < count; first += kMostTerms) {
    const int64_t some = std::min(kMostTerms, count - first);
    micro_kernel<T>()->product(m, as_list(m, terms + first, some).data(), some, terms->b->width(terms->j), c, ldc,
                               first > 0, next);
  }
}
template <class T>
void sum_of_products(int64_t m, const Term<T>* terms, int64_t count, T* out, int64_t ld_out, int64_t columns,
                     float* room, const Ahead& next, bool past_cache) {
  const int64_t width = terms->b->width(terms->j);
  if (count <= kMostTerms)
    return micro_kernel<T>()->product_rounded(m, as_list(m, terms, count).data(), count, width, out, ld_out, columns,
                                              past_cache, next);
  for (int64_t r = 0; r < m; r += kBlock) {
    const int64_t rows = std::min(kBlock, m - r);
    std::vector<Term<T>> below(terms, terms + count);
    for (auto& term : below) term.a += r * term.lda;
    sum_of_products(rows, below.data(), count, room, width, next);
    loops<T>().round_rows(room, width, out + r * ld_out, ld_out, rows, columns);
  }
}

template <class T>
void outer_product(int64_t rows, const T* t, int64_t ldt, const float* s, int64_t columns, T* in, int64_t ld,
                   int64_t width, float* acc, int64_t ld_acc, bool accumulate) {
  if constexpr (sizeof(T) == 2)
    for (int64_t r = rows; r < padded_rows(rows); ++r) std::fill_n(in + r * ld, width, T{});
  micro_kernel<T>()->outer(rows, t, ldt, s, columns, in, ld, width, acc, ld_acc, accumulate);
}

void release_tiles() {
  if (micro_kernel<bf16>() == &amx::kBf16Kernel) amx::release();
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
  forget_made_panels();
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
    const size_t start = (reinterpret_cast<size_t>(memory.get()) + a.offset + kAlign - 1) / kAlign * kAlign -
                         reinterpret_cast<size_t>(memory.get());
    if (start + bytes <= size) {
      a.offset = start + bytes;
      return memory.get() + start;
    }
    ++a.slab;
    a.offset = 0;
  }
}

#define MOEGRAFT_INSTANTIATE(T)                                                                                      \
  template Panels<T> pack_transposed(const T*, int64_t, int64_t, int64_t, T*);                                       \
  template Panels<T> pack_plain(const T*, int64_t, int64_t, int64_t, T*);                                            \
  template void outer_product(int64_t, const T*, int64_t, const float*, int64_t, T*, int64_t, int64_t, float*,       \
                              int64_t, bool);                                                                        \
  template void sum_of_products(int64_t, const Term<T>*, int64_t, float*, int64_t, const Ahead&);                    \
  template void sum_of_products(int64_t, const Term<T>*, int64_t, T*, int64_t, int64_t, float*, const Ahead&, bool); \
  template void product(int64_t, const T*, int64_t, const Panels<T>&, int64_t, float*, int64_t, bool, const Ahead&); \
  template void product(int64_t, const T*, int64_t, const Panels<T>&, float*, int64_t, bool);
MOEGRAFT_INSTANTIATE(float)
MOEGRAFT_INSTANTIATE(bf16)
#undef MOEGRAFT_INSTANTIATE

}  // namespace moegraft::kernels
