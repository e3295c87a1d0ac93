#include "moegraft/model/host_arena.h"

#include "libtorch.h"

#include <algorithm>
#include <bit>

#include "moegraft/base/check.h"

namespace moegraft::model {

at::Tensor HostArena::page_locked(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(true));
}

HostArena::HostArena(Source source, int64_t chunk_bytes) : source_(std::move(source)), chunk_bytes_(chunk_bytes) {
  MOEGRAFT_INVARIANT(chunk_bytes >= 16 && std::has_single_bit(uint64_t(chunk_bytes)), "HostArena: chunks of ",
                     chunk_bytes, " bytes; a power of two would lose nothing");
}

std::vector<at::Tensor> HostArena::take(int64_t numel, at::ScalarType dtype) {
  const int64_t item = int64_t(c10::elementSize(dtype));
  MOEGRAFT_INVARIANT(taken_ % item == 0, "HostArena: elements of ", item, " bytes from byte ", taken_, " on");
  std::vector<at::Tensor> out;
  for (int64_t left = numel * item; left > 0;) {
    if (taken_ == bytes_locked()) chunks_.push_back(source_(chunk_bytes_));
    const int64_t begin = taken_ - (bytes_locked() - chunk_bytes_), bytes = std::min(left, chunk_bytes_ - begin);
    out.push_back(chunks_.back().narrow(0, begin, bytes).view(dtype));
    taken_ += bytes;
    left -= bytes;
  }
  return out;
}

void copy_end_to_end(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& to, bool non_blocking) {
  auto target = to.begin();
  int64_t filled = 0;  // of *target
  for (const auto& t : from) {
    const at::Tensor flat = t.reshape({-1});
    for (int64_t done = 0; done < flat.numel();) {
      while (target != to.end() && filled == target->numel()) ++target, filled = 0;
      MOEGRAFT_INVARIANT(target != to.end(), "copy_end_to_end: more elements than there is room for");
      const int64_t count = std::min(flat.numel() - done, target->numel() - filled);
      target->view({-1}).narrow(0, filled, count).copy_(flat.narrow(0, done, count), non_blocking);
      done += count;
      filled += count;
    }
  }
  while (target != to.end() && filled == target->numel()) ++target, filled = 0;
  MOEGRAFT_INVARIANT(target == to.end(), "copy_end_to_end: fewer elements than there is room for");
}

}  // namespace moegraft::model
