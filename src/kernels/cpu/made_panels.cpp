// Panels of stored operands (block_product.h): dequantised, or turned from the layout of the other pass, when a product
// reads them.
#include <array>
#include <vector>

#include "../formats/formats.h"
#include "block_product.h"
#include "made_panels.h"

namespace moegraft::kernels {
namespace {

int64_t stored_width(const StoredOperand& s, int64_t j) { return padded_width(std::min(kPanel, s.n - j * kPanel)); }

// Elements of the two layouts are the same, in another order: a block of 64 x 64 of each stored panel becomes one of
// this one.
template <class T>
void turn(const Panels<T>& b, int64_t j, T* out) {
  const StoredOperand& s = b.stored;
  const int64_t columns = b.columns(j), width = b.width(j), next = std::min(kPanel, b.n - (j + 1) * kPanel);
  alignas(64) T block[kPanel * kPanel];
  for (int64_t row = 0; row < b.k; row += kPanel) {
    const int64_t i = (b.first + row) / kPanel, w = stored_width(s, i);
    const T* from = block;
    if (s.format) {
      s.format->dequantise(static_cast<const uint8_t*>(stored_panel<T>(s, i)), w, j * kPanel, padded_depth<T>(columns),
                           block);
    } else {
      from = static_cast<const T*>(stored_panel<T>(s, i)) + j * kPanel * w;
      if (next > 0) fetch(from + kPanel * w, next * w);  // of the next panel, while this one's products run
    }
    loops<T>().turn_panel(from, w, columns, std::min(kPanel, b.k - row), out + row * width, width);
  }
}

struct Made {
  const void* data = nullptr;
  int64_t first = 0, k = 0, j = 0;
  bool turned = false;
  size_t size_of = 0;
  uint64_t used = 0;
  std::vector<std::byte> memory;
};
struct Cache {
  std::array<Made, kMadePanels> made;
  uint64_t clock = 0;
};
Cache& cache() {
  thread_local Cache c;
  return c;
}

constexpr size_t kAlign = 64;
std::byte* aligned(std::vector<std::byte>& memory) {
  return memory.data() + (kAlign - reinterpret_cast<size_t>(memory.data()) % kAlign) % kAlign;
}

}  // namespace

void forget_made_panels() {
  for (Made& m : cache().made) m.data = nullptr, m.used = 0;
}

template <class T>
const T* make_panel(const Panels<T>& b, int64_t j) {
  Cache& c = cache();
  const StoredOperand& s = b.stored;
  const auto holds = [&](const Made& m) {
    return m.data == s.data && m.first == b.first && m.k == b.k && m.j == j && m.turned == s.turned &&
           m.size_of == sizeof(T);
  };
  auto at = std::find_if(c.made.begin(), c.made.end(), holds);
  if (at == c.made.end()) {
    at = std::min_element(c.made.begin(), c.made.end(), [](const Made& x, const Made& y) { return x.used < y.used; });
    // Readers may touch padded_rows of a panel that is a left operand.
    if (const size_t bytes = size_t(round_up(b.k, kPanel) * kPanel) * sizeof(T) + kAlign; at->memory.size() < bytes)
      at->memory.resize(bytes);
    T* out = reinterpret_cast<T*>(aligned(at->memory));
    if (s.turned)
      turn(b, j, out);
    else
      s.format->dequantise(static_cast<const uint8_t*>(stored_panel<T>(s, j)), stored_width(s, j), b.first, b.depth(),
                           out);
    at->data = s.data, at->first = b.first, at->k = b.k, at->j = j, at->turned = s.turned, at->size_of = sizeof(T);
  }
  at->used = ++c.clock;
  return reinterpret_cast<const T*>(aligned(at->memory));
}

template <class T>
Range stored_range(const Panels<T>& b, int64_t j, int64_t part, int64_t parts) {
  if (b.stored.turned) return {};
  const int64_t size = b.stored.format->groups(b.stored.k) * b.stored.format->group_bytes(stored_width(b.stored, j)),
                share = round_up((size + parts - 1) / parts, int64_t(kAlign)), begin = std::min(size, part * share);
  return {static_cast<const uint8_t*>(stored_panel<T>(b.stored, j)) + begin, std::min(share, size - begin)};
}

template const float* make_panel(const Panels<float>&, int64_t);
template const bf16* make_panel(const Panels<bf16>&, int64_t);
template Range stored_range(const Panels<float>&, int64_t, int64_t, int64_t);
template Range stored_range(const Panels<bf16>&, int64_t, int64_t, int64_t);

}  // namespace moegraft::kernels
