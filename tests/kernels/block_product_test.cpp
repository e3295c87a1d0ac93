// Block products against plain ones, in every shape that the micro-kernels treat apart: row, column and depth tails,
// several terms, rounding, narrow panels.
#include <gtest/gtest.h>

#include "kernels/cpu/block_product.h"
#include "libtorch.h"

namespace moegraft::kernels {
namespace {

at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype) {
  auto g = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::empty(shape, at::kDouble).normal_(0, 1, g).to(dtype);
}
double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// A left operand as the products want it: rows padded to 16, what is beyond them and beyond the depth NaN.
template <class T>
at::Tensor left(const at::Tensor& a) {
  at::Tensor out = at::full({padded_rows(a.size(0)), copied_depth<T>(a.size(1))}, NAN, a.options());
  out.narrow(0, 0, a.size(0)).narrow(1, 0, padded_depth<T>(a.size(1))).zero_();
  out.narrow(0, 0, a.size(0)).narrow(1, 0, a.size(1)).copy_(a);
  return out;
}

template <class T>
void products_match() {
  if (!has_block_products(kTypeOf<T>)) GTEST_SKIP() << "no micro-kernel for this type here";
  for (const int64_t m : {1, 16, 17, 33, 64, 300})
    for (const int64_t k : {1, 16, 31, 32, 64, 200, 512})
      for (const int64_t n : {1, 16, 20, 40, 64, 130}) {
        const int64_t k2 = 24;
        const at::Tensor a = randn({m, k}, 1, kTypeOf<T>), w = randn({n, k}, 2, kTypeOf<T>),
                         a2 = randn({m, k2}, 3, kTypeOf<T>), w2 = randn({k2, n}, 4, kTypeOf<T>);
        const at::Tensor first = at::matmul(a.to(at::kDouble), w.to(at::kDouble).t()),
                         both = first + at::matmul(a2.to(at::kDouble), w2.to(at::kDouble));
        const at::Tensor la = left<T>(a), la2 = left<T>(a2),
                         memory = at::empty({Panels<T>::elements(k, n)}, a.options()),
                         memory2 = at::empty({Panels<T>::elements(k2, n)}, a.options());
        const Panels<T> b = pack_transposed(data<T>(w), k, k, n, mutable_data<T>(memory)),
                        b2 = pack_plain(data<T>(w2), n, k2, n, mutable_data<T>(memory2));
        const double tolerance = 1e-6 * double(k + k2) * 16;  // float32 sums of products up to 16
        at::Tensor c = at::full({padded_rows(m), padded_width(n)}, 7.0, at::kFloat), sum = c.clone(),
                   rounded = at::full({m + 1, n + 1}, 7.0, a.options());
        product(m, data<T>(la), la.size(1), b, mutable_data<float>(c), c.size(1), false);
        EXPECT_LT(distance(c.narrow(0, 0, m).narrow(1, 0, n), first), tolerance) << m << " " << k << " " << n;
        product(m, data<T>(la2), la2.size(1), b2, mutable_data<float>(c), c.size(1), true);
        EXPECT_LT(distance(c.narrow(0, 0, m).narrow(1, 0, n), both), tolerance) << m << " " << k << " " << n;
        std::vector<float> room(kBlock * kPanel);
        for (int64_t j = 0; j < b.count(); ++j) {
          const Term<T> terms[]{{data<T>(la), la.size(1), &b, j}, {data<T>(la2), la2.size(1), &b2, j}};
          sum_of_products(m, terms, 2, mutable_data<float>(sum) + j * kPanel, sum.size(1),
                          ahead(panel_range(b, j + 1)));
          sum_of_products(m, terms, 2, mutable_data<T>(rounded) + j * kPanel, rounded.size(1), b.columns(j),
                          room.data());
        }
        EXPECT_TRUE(at::equal(sum.narrow(0, 0, m), c.narrow(0, 0, m)) ||
                    distance(sum.narrow(0, 0, m).narrow(1, 0, n), both) < tolerance);
        EXPECT_TRUE(at::equal(rounded.narrow(0, 0, m).narrow(1, 0, n),
                              sum.narrow(0, 0, m).narrow(1, 0, n).to(a.scalar_type())));
        EXPECT_EQ(rounded[m].min().template item<float>(), 7.0f);  // exactly [m, n] is written
        EXPECT_EQ(rounded.select(1, n).min().template item<float>(), 7.0f);
      }
  release_tiles();
}

TEST(BlockProduct, MatchesPlainInFloat) { products_match<float>(); }
TEST(BlockProduct, MatchesPlainInBfloat16) { products_match<bf16>(); }

TEST(BlockProduct, PastTheCacheTheBitsAreTheSame) {
  if (!has_block_products(at::kBFloat16)) GTEST_SKIP() << "no micro-kernel for this type here";
  const int64_t m = 70, k = 96, n = 128;
  const at::Tensor a = left<bf16>(randn({m, k}, 1, at::kBFloat16)), w = randn({n, k}, 2, at::kBFloat16),
                   memory = at::empty({Panels<bf16>::elements(k, n)}, a.options());
  const Panels<bf16> b = pack_transposed(data<bf16>(w), k, k, n, mutable_data<bf16>(memory));
  at::Tensor near = at::empty({m, n}, a.options()), past = at::empty({m, n}, a.options());
  std::vector<float> room(kBlock * kPanel);
  for (int64_t j = 0; j < b.count(); ++j) {
    const Term<bf16> term{data<bf16>(a), a.size(1), &b, j};
    sum_of_products(m, &term, 1, mutable_data<bf16>(near) + j * kPanel, n, b.columns(j), room.data());
    sum_of_products(m, &term, 1, mutable_data<bf16>(past) + j * kPanel, n, b.columns(j), room.data(), {}, true);
  }
  release_tiles();
  EXPECT_TRUE(at::equal(near, past));
}

// A row's bits do not depend on how many rows are beside it.
template <class T>
void rows_bits_are_their_own() {
  const auto dtype = kTypeOf<T>;
  if (!has_block_products(dtype)) GTEST_SKIP() << "no micro-kernel for this type here";
  const int64_t m = 150, k = 272, n = 80;
  const at::Tensor plain = randn({m, k}, 1, dtype), w = randn({n, k}, 2, dtype),
                   memory = at::empty({Panels<T>::elements(k, n)}, plain.options()), a = left<T>(plain);
  const Panels<T> b = pack_transposed(data<T>(w), k, k, n, mutable_data<T>(memory));
  at::Tensor all = at::empty({padded_rows(m), padded_width(n)}, at::kFloat);
  product(m, data<T>(a), a.size(1), b, mutable_data<float>(all), all.size(1), false);
  for (const int64_t r : {0, 15, 31, 77, 149}) {
    const at::Tensor row = left<T>(plain.narrow(0, r, 1)), c = at::empty({16, padded_width(n)}, at::kFloat);
    product(1, data<T>(row), row.size(1), b, mutable_data<float>(c), c.size(1), false);
    EXPECT_TRUE(at::equal(c[0].narrow(0, 0, n), all[r].narrow(0, 0, n))) << "row " << r;
  }
  release_tiles();
}
TEST(BlockProduct, ARowsBitsAreItsOwnInFloat) { rows_bits_are_their_own<float>(); }
TEST(BlockProduct, ARowsBitsAreItsOwnInBfloat16) { rows_bits_are_their_own<bf16>(); }

template <class T>
void outer_products_match() {
  if (!has_block_products(kTypeOf<T>)) GTEST_SKIP() << "no micro-kernel for this type here";
  for (const int64_t rows : {1, 16, 37, 40, 700})
    for (const int64_t width : {1, 2, 31, 34, 64, 100})
      for (const bool scaled : {false, true}) {
        const at::Tensor t = randn({rows, 32}, 1, kTypeOf<T>), in = randn({rows, width}, 2, kTypeOf<T>),
                         s = randn({rows}, 3, at::kFloat);
        at::Tensor padded = at::full({padded_rows(rows), copied_depth<T>(width)}, NAN, in.options()),
                   acc = at::zeros({32, padded_width(width)}, at::kFloat);
        padded.narrow(0, 0, rows).narrow(1, 0, width).copy_(in);
        for (const bool accumulate : {false, true})
          outer_product(rows, data<T>(t), 32, scaled ? data<float>(s) : nullptr, 32, mutable_data<T>(padded),
                        padded.size(1), width, mutable_data<float>(acc), acc.size(1), accumulate);
        const at::Tensor left = scaled ? (t.to(at::kFloat) * s.unsqueeze(1)).to(kTypeOf<T>) : t;
        const at::Tensor exact = at::matmul(left.to(at::kDouble).t(), in.to(at::kDouble)) * 2;
        EXPECT_LT(distance(acc.narrow(1, 0, width), exact), 1e-6 * double(rows) * 16 + 1e-5) << rows << " " << width;
      }
  release_tiles();
}
TEST(BlockProduct, OuterProductMatchesPlainInFloat) { outer_products_match<float>(); }
TEST(BlockProduct, OuterProductMatchesPlainInBfloat16) { outer_products_match<bf16>(); }

}  // namespace
}  // namespace moegraft::kernels
