#pragma once
// Device kernels as they are launched, on the CPU: the .cu files compiled against tests/support/cuda_stand_in, each
// kernel's arrays compared bit by bit with what the same functor leaves on the host (host_run.h). A test file includes
// a .cu file after this header: every kernel that it instantiates then becomes a test, and one for which there is no
// Case does not compile.

#include <cuda_runtime.h>

#include <gtest/gtest.h>

#include <new>
#include <random>

#include "kernels/cuda/device_run.cuh"
#include "kernels/cuda/host_run.h"

namespace moegraft::kernels::cuda {

template <class F>
inline int launches_of = 0;

struct OnStandIn {
  template <class F>
  static void threads(const F& f, int64_t count) {
    launch_threads(f, count, nullptr);
    ++launches_of<F>;
  }
  template <class F>
  static void rows(const F& f, int64_t count) {
    launch_rows(f, count, nullptr);
    ++launches_of<F>;
  }
};

// The arrays of one run: the same calls give the same contents. Each starts `shift` elements behind a multiple of 16
// bytes and ends where the allocation does.
class Arrays {
 public:
  explicit Arrays(int shift = 0) : shift_(shift) {}

  template <class T, class Value>
  T* fill(int64_t n, const Value& value) {
    T* to = take<T>(n);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(value(i));
    return to;
  }
  template <class T>
  T* random(int64_t n, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    return fill<T>(n, [&](int64_t) { return normal(engine_); });
  }
  int64_t below(int64_t n) { return int64_t(engine_() % uint64_t(n)); }
  // For results; what a kernel leaves out keeps the pattern.
  template <class T>
  T* empty(int64_t n) {
    T* to = take<T>(n);
    std::memset(static_cast<void*>(to), 0x5a, size_t(n) * sizeof(T));
    return to;
  }

  void expect_equal(const Arrays& other, const std::string& what) const {
    ASSERT_EQ(all_.size(), other.all_.size()) << what;
    for (size_t i = 0; i < all_.size(); ++i) {
      ASSERT_EQ(all_[i].bytes, other.all_[i].bytes) << what;
      const auto *a = all_[i].start(), *b = other.all_[i].start();
      const auto at = std::mismatch(a, a + all_[i].bytes, b).first - a;
      EXPECT_EQ(size_t(at), all_[i].bytes) << what << ": array " << i << " differs first at its byte " << at;
    }
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{16}); }
  };
  struct Array {
    std::unique_ptr<std::byte, Free> memory;
    size_t skipped, bytes;
    const std::byte* start() const { return memory.get() + skipped; }
  };
  template <class T>
  T* take(int64_t n) {
    const size_t skipped = size_t(shift_) * sizeof(T), bytes = size_t(n) * sizeof(T);
    auto* memory = static_cast<std::byte*>(::operator new[](skipped + bytes, std::align_val_t{16}));
    all_.push_back({std::unique_ptr<std::byte, Free>(memory), skipped, bytes});
    return reinterpret_cast<T*>(memory + skipped);
  }

  int shift_;
  std::mt19937_64 engine_{7};
  std::vector<Array> all_;
};

// How a kernel is run: `template <class Run> static void run(Arrays&, int64_t rows)` makes its inputs and starts it by
// Run, in every variant that it has.
template <class F>
struct Case;

// Elements that a kernel moves together, where it has such a parameter; they then start at 16 bytes.
template <class F>
constexpr int pack_of = 1;
template <template <class, int> class F, class T, int V>
constexpr int pack_of<F<T, V>> = V;
template <template <class, class, int> class F, class T, class U, int V>
constexpr int pack_of<F<T, U, V>> = V;
template <template <class, class, class, int> class F, class T, class U, class W, int V>
constexpr int pack_of<F<T, U, W, V>> = V;

// No rows, one, and several blocks of which the last is not full: a block holds 256 threads, or four rows of a warp
// each, or one row of more lanes.
template <class F>
constexpr int64_t most_rows() {
  if constexpr (requires { F::kLanes; })
    return F::kLanes > 32 ? 2 : 5;
  else
    return 70;
}

template <class F>
void expect_equal_bits() {
  for (const int64_t rows : {int64_t{0}, int64_t{1}, most_rows<F>()}) {
    const int shift = pack_of<F> > 1 ? 0 : 1, before = launches_of<F>;
    Arrays host(shift), device(shift);
    Case<F>::template run<OnHost>(host, rows);
    Case<F>::template run<OnStandIn>(device, rows);
    EXPECT_GT(launches_of<F>, before) << "the case starts another kernel";
    device.expect_equal(host, std::to_string(rows) + " rows");
  }
}

template <class F>
int add_kernel_test(const char* name, const char* file, int line) {
  struct KernelTest : ::testing::Test {
    void TestBody() override { expect_equal_bits<F>(); }
  };
  ::testing::RegisterTest("CudaLaunch", name, nullptr, nullptr, file, line,
                          []() -> ::testing::Test* { return new KernelTest; });
  return 0;
}

}  // namespace moegraft::kernels::cuda

#define MOEGRAFT_JOIN_(a, b) a##b
#define MOEGRAFT_JOIN(a, b) MOEGRAFT_JOIN_(a, b)
#undef MOEGRAFT_THREADS
#undef MOEGRAFT_ROWS
#define MOEGRAFT_THREADS(...)                                           \
  [[maybe_unused]] const int MOEGRAFT_JOIN(kernel_test_, __COUNTER__) = \
      add_kernel_test<__VA_ARGS__>(#__VA_ARGS__, __FILE__, __LINE__)
#define MOEGRAFT_ROWS(...)                                              \
  [[maybe_unused]] const int MOEGRAFT_JOIN(kernel_test_, __COUNTER__) = \
      add_kernel_test<__VA_ARGS__>(#__VA_ARGS__, __FILE__, __LINE__)
