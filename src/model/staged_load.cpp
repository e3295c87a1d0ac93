#include "staged_load.h"

#include "libtorch.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>

#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/progress.h"
#include "moegraft/model/host_arena.h"

namespace moegraft::model {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20, kShown = 1024 * kMiB;  // smaller loads are over before a bar is read

}  // namespace

void StagedLoad::add(io::FileRange from, at::ScalarType type, at::Tensor to) {
  MOEGRAFT_INVARIANT(to.is_contiguous() && to.device().type() == device_.type() &&
                         from.bytes == to.numel() * int64_t(c10::elementSize(type)),
                     "StagedLoad: ", from.bytes, " bytes of ", c10::toString(type), " for ", to.sizes(), " on ",
                     to.device().str());
  from_.push_back(std::move(from));
  types_.push_back(type);
  to_.push_back(std::move(to));
}

void StagedLoad::copy(const io::ReadPiece& piece) const {
  const at::ScalarType type = types_[piece.range];
  at::Tensor numbers = piece.bytes.view(type);
  const at::Tensor to =
      to_[piece.range].view({-1}).narrow(0, piece.begin / int64_t(c10::elementSize(type)), numbers.numel());
  // Converted on the device: across devices LibTorch would convert on the host, into memory that is not page-locked.
  if (to.scalar_type() != type) numbers = numbers.to(device_, /*non_blocking=*/true);
  to.copy_(numbers, /*non_blocking=*/true);
}

void StagedLoad::run(const std::string& title) {
  const at::NoGradGuard no_grad;
  int64_t total = 0, done = 0;
  for (const auto& range : from_) total += range.bytes;
  if (total == 0) return;
  // A power of two: what LibTorch's host allocator gives without loss (host_arena.h).
  const int64_t room = std::min(staging_.buffer_bytes, int64_t(std::bit_ceil(uint64_t(std::max<int64_t>(total, 64)))));
  std::vector<at::Tensor> buffers;
  for (int64_t i = 0; i < staging_.buffers; ++i)
    buffers.push_back(device_.is_cuda() ? HostArena::page_locked(room) : at::empty({room}, at::kByte));
  const auto wait_for_copies = [this] {
    if (!device_.is_cuda()) return;
    const c10::impl::VirtualGuardImpl guard(device_.type());
    guard.synchronizeStream(guard.getStream(device_));
  };
  std::optional<Progress> progress;
  if (!title.empty() && total >= kShown) progress.emplace(title, total / kMiB);
  const auto start = std::chrono::steady_clock::now();
  io::read_ahead(from_, buffers, {staging_.threads, std::min(staging_.piece_bytes, room)},
                 [&](const std::vector<io::ReadPiece>& pieces) {
                   for (const auto& piece : pieces) {
                     copy(piece);
                     done += piece.bytes.numel();
                   }
                   wait_for_copies();  // then this buffer is filled anew; the others fill meanwhile
                   if (!progress) return;
                   char rate[32];
                   std::snprintf(rate, sizeof rate, "MiB, %.2f GB/s", double(done) / 1e9 / seconds_since(start));
                   progress->update(done / kMiB, rate);
                 });
  if (progress) progress->finish();
  if (!device_.is_cuda()) return;
  buffers.clear();
  wait_for_copies();                                    // the allocator has recorded an event of its own
  at::getHostAllocator(device_.type())->empty_cache();  // it would keep them locked for requests of this size
}

}  // namespace moegraft::model
