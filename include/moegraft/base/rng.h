#pragma once
// Counter-based random numbers (Philox4x32-10; Salmon et al., SC'11): a stream is a pure function of (seed, purpose,
// index), so nothing depends on history and a resumed run draws what an uninterrupted one would.

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace moegraft {

class Rng {
 public:
  // purpose names the use ("data.shuffle", "sample"); index is typically a step or a picture number.
  Rng(uint64_t seed, std::string_view purpose, uint64_t index = 0);

  uint32_t next_u32();
  uint64_t next_u64();
  double uniform();            // [0, 1), 53 bits
  double normal();             // Box-Muller
  uint64_t below(uint64_t n);  // [0, n), unbiased; n > 0
  std::vector<int64_t> permutation(int64_t n);
  // A seed for a library generator (at::Generator) of the same stream.
  uint64_t derive_seed() { return next_u64(); }

 private:
  void refill();
  std::array<uint32_t, 2> key_;
  std::array<uint32_t, 4> counter_, block_{};
  int used_ = 4;
  bool has_spare_ = false;
  double spare_ = 0;
};

}  // namespace moegraft
