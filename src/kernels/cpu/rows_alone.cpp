// Asks the block products of this machine whether a row's bits depend on what is beside it.

#include <algorithm>
#include <cstring>

#include "block_product.h"
#include "moegraft/base/rng.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

// The library makes a kernel for every shape, so every height and width is tried, against one block as high and wide as
// can be.
template <class T>
bool one_order(int64_t k) {
  const int64_t depth = padded_depth<T>(k);
  Rng rng(uint64_t(k), "kernels.one_order");
  at::Tensor random = at::empty({kBlock + k, std::max(depth, kPanel)}, at::kFloat);
  for (int64_t i = 0; i < random.numel(); ++i) random.mutable_data_ptr<float>()[i] = float(rng.uniform() - 0.5);
  const at::Tensor a = random.narrow(0, 0, kBlock).narrow(1, 0, depth).to(kTypeOf<T>).contiguous(),
                   b = random.narrow(0, kBlock, k).narrow(1, 0, kPanel).to(kTypeOf<T>).contiguous();
  std::vector<T> panel(static_cast<size_t>(Panels<T>::elements(k, kPanel)));
  std::vector<float> want(2 * kBlock * kPanel), got(2 * kBlock * kPanel);
  bool same = true;
  for (int64_t n = kPanel; n >= 16; n -= 16) {
    const Panels<T> panels = pack_plain(data<T>(b), kPanel, k, n, panel.data());
    if (n == kPanel) product(kBlock, data<T>(a), depth, panels, 0, want.data(), kPanel, false);
    for (const int64_t m : {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 96, 127, 128})
      for (const int64_t begin : {int64_t{0}, (kBlock - round_up(m, 16)) / 2}) {
        product(m, data<T>(a) + begin * depth, depth, panels, 0, got.data(), kPanel, false);
        for (int64_t r = 0; r < m; ++r)
          same &=
              std::memcmp(got.data() + r * kPanel, want.data() + (begin + r) * kPanel, size_t(n) * sizeof(float)) == 0;
      }
  }
  release_tiles();
  return same;
}

}  // namespace

bool rows_stand_alone(at::ScalarType dtype, const std::vector<int64_t>& depths) {
  if (!has_block_products(dtype)) return false;
  return std::all_of(depths.begin(), depths.end(),
                     [&](int64_t k) { return dtype == at::kFloat ? one_order<float>(k) : one_order<bf16>(k); });
}

}  // namespace moegraft::kernels
