#include "moegraft/base/rng.h"

#include <cmath>
#include <numbers>
#include <numeric>

#include "moegraft/base/check.h"

namespace moegraft {
namespace {

// FNV-1a then a splitmix64 finaliser: a stable 64-bit name for a purpose.
uint64_t hash(std::string_view text) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
  return h ^ (h >> 31);
}

}  // namespace

Rng::Rng(uint64_t seed, std::string_view purpose, uint64_t index) {
  key_ = {uint32_t(seed), uint32_t(seed >> 32)};
  // Counter words 0..1 count blocks of a stream mixed with the purpose; words 2..3 hold the index mixed with it.
  const uint64_t p = hash(purpose);
  key_[0] ^= uint32_t(p);
  key_[1] ^= uint32_t(p >> 32);
  counter_ = {0, 0, uint32_t(index), uint32_t(index >> 32)};
}

void Rng::refill() {
  auto x = counter_;
  auto k = key_;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
    x = {uint32_t(b >> 32) ^ x[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k[1], uint32_t(a)};
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  block_ = x;
  if (++counter_[0] == 0) ++counter_[1];
  used_ = 0;
}

uint32_t Rng::next_u32() {
  if (used_ == 4) refill();
  return block_[used_++];
}

uint64_t Rng::next_u64() {
  const uint64_t low = next_u32();
  return low | uint64_t(next_u32()) << 32;
}

double Rng::uniform() { return double(next_u64() >> 11) * 0x1.0p-53; }

double Rng::normal() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  const double angle = 2.0 * std::numbers::pi * uniform();
  spare_ = radius * std::sin(angle);
  has_spare_ = true;
  return radius * std::cos(angle);
}

uint64_t Rng::below(uint64_t n) {
  MOEGRAFT_INVARIANT(n > 0, "Rng::below(0)");
  const uint64_t limit = -n % n;  // reject the biased tail (Lemire-style threshold)
  uint64_t r;
  do r = next_u64();
  while (r < limit);
  return r % n;
}

std::vector<int64_t> Rng::permutation(int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[below(uint64_t(i) + 1)]);
  return order;
}

}  // namespace moegraft
