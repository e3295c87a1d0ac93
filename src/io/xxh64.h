#pragma once
// XXH64 (Collet, "xxHash fast digest algorithm", seed 0): about memory speed, and stable across versions because it is
// a published format.

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>

namespace moegraft::io {

class Xxh64 {
 public:
  void update(const char* data, size_t bytes) {
    total_ += bytes;
    if (used_ > 0) {
      const size_t take = std::min(bytes, kStripe - used_);
      std::memcpy(buffer_.data() + used_, data, take);
      used_ += take, data += take, bytes -= take;
      if (used_ < kStripe) return;
      stripe(buffer_.data());
      used_ = 0;
    }
    for (; bytes >= kStripe; data += kStripe, bytes -= kStripe) stripe(data);
    std::memcpy(buffer_.data(), data, bytes);
    used_ = bytes;
  }

  uint64_t digest() const {
    uint64_t h = kP5;
    if (total_ >= kStripe) {
      h = std::rotl(lane_[0], 1) + std::rotl(lane_[1], 7) + std::rotl(lane_[2], 12) + std::rotl(lane_[3], 18);
      for (const uint64_t lane : lane_) h = (h ^ round(0, lane)) * kP1 + kP4;
    }
    h += total_;
    const char* at = buffer_.data();
    size_t left = used_;
    for (; left >= 8; at += 8, left -= 8) h = std::rotl(h ^ round(0, load<uint64_t>(at)), 27) * kP1 + kP4;
    if (left >= 4) {
      h = std::rotl(h ^ (load<uint32_t>(at) * kP1), 23) * kP2 + kP3;
      at += 4, left -= 4;
    }
    for (; left > 0; ++at, --left) h = std::rotl(h ^ (load<uint8_t>(at) * kP5), 11) * kP1;
    h = (h ^ (h >> 33)) * kP2;
    h = (h ^ (h >> 29)) * kP3;
    return h ^ (h >> 32);
  }

  std::string hex() const {
    std::string text(16, '0');
    uint64_t value = digest();
    for (size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
    return text;
  }

 private:
  static constexpr uint64_t kP1 = 0x9E3779B185EBCA87ULL, kP2 = 0xC2B2AE3D27D4EB4FULL, kP3 = 0x165667B19E3779F9ULL,
                            kP4 = 0x85EBCA77C2B2AE63ULL, kP5 = 0x27D4EB2F165667C5ULL;
  static constexpr size_t kStripe = 32;

  template <class T>
  static uint64_t load(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  static uint64_t round(uint64_t lane, uint64_t input) { return std::rotl(lane + input * kP2, 31) * kP1; }
  void stripe(const char* at) {
    for (size_t i = 0; i < 4; ++i) lane_[i] = round(lane_[i], load<uint64_t>(at + 8 * i));
  }

  std::array<uint64_t, 4> lane_{kP1 + kP2, kP2, 0, 0 - kP1};
  std::array<char, kStripe> buffer_{};
  size_t used_ = 0;
  uint64_t total_ = 0;
};

}  // namespace moegraft::io
