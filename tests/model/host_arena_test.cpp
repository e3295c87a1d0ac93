// Chunks of host memory that layers run through: which bytes lie where, and that nothing but the last chunk's rest is
// lost.
#include "moegraft/model/host_arena.h"

#include "libtorch.h"

#include <gtest/gtest.h>

#include "../support/gpu.h"
#include "moegraft/base/check.h"

namespace moegraft::model {
namespace {

// Where page-locked memory would be; counts what is asked for.
struct Memory {
  std::vector<int64_t> asked;
  HostArena::Source source() {
    return [this](int64_t bytes) {
      asked.push_back(bytes);
      return at::full({bytes}, 0xEE, at::kByte);
    };
  }
};

std::vector<int64_t> sizes(const std::vector<at::Tensor>& parts) {
  std::vector<int64_t> out;
  for (const auto& t : parts) out.push_back(t.numel());
  return out;
}

TEST(HostArena, RequestsRunThroughChunks) {
  Memory memory;
  HostArena arena(memory.source(), 64);
  EXPECT_EQ(arena.bytes_locked(), 0);
  const auto a = arena.take(10, at::kFloat), b = arena.take(10, at::kFloat), c = arena.take(40, at::kFloat),
             none = arena.take(0, at::kFloat), d = arena.take(4, at::kFloat);
  EXPECT_EQ(sizes(a), (std::vector<int64_t>{10}));
  EXPECT_EQ(sizes(b), (std::vector<int64_t>{6, 4})) << "24 bytes were left of the first chunk";
  EXPECT_EQ(sizes(c), (std::vector<int64_t>{12, 16, 12}));
  EXPECT_TRUE(none.empty());
  EXPECT_EQ(sizes(d), (std::vector<int64_t>{4})) << "the fourth chunk ends here";
  EXPECT_EQ(memory.asked, (std::vector<int64_t>{64, 64, 64, 64}));
  EXPECT_EQ(arena.bytes_taken(), 256);
  EXPECT_EQ(arena.bytes_locked(), 256);
  // Every byte once: numbers written through the views read back.
  float next = 0;
  for (const auto* parts : {&a, &b, &c, &d})
    for (const at::Tensor& t : *parts) {
      EXPECT_EQ(t.scalar_type(), at::kFloat);
      t.copy_(at::arange(next, next + float(t.numel()), at::kFloat));
      next += float(t.numel());
    }
  float expected = 0;
  for (const auto* parts : {&a, &b, &c, &d})
    for (const at::Tensor& t : *parts)
      for (int64_t i = 0; i < t.numel(); ++i) EXPECT_EQ(t[i].item<float>(), expected++);
  EXPECT_EQ(expected, 64);
}

TEST(HostArena, LosesTheRestOfTheLastChunkAlone) {
  // 48 layers of 128 experts as in Qwen3-30B-A3B, by their sizes: a request of its own for each layer would lock 96
  // GiB.
  const int64_t layer = int64_t{128} * 3 * 768 * 2048 * 2, layers = 48;
  const at::Tensor none = at::empty({1}, at::kByte).expand({kChunkBytes});  // of one byte's memory
  HostArena arena([&](int64_t bytes) { return none.as_strided({bytes}, {0}); });
  int64_t taken = 0;
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t left = layer; left > 0; left -= kChunkBytes) arena.take(std::min(left, kChunkBytes), at::kByte);
    taken += layer;
  }
  EXPECT_EQ(arena.bytes_taken(), taken);
  EXPECT_EQ(arena.bytes_locked(), (taken + kChunkBytes - 1) / kChunkBytes * kChunkBytes);
  EXPECT_LE(arena.bytes_locked() - taken, kChunkBytes - 1);
}

TEST(HostArena, RefusesWhatItWasNotMadeFor) {
  Memory memory;
  EXPECT_THROW(HostArena(memory.source(), 48), InvariantError);
  EXPECT_THROW(HostArena(memory.source(), 8), InvariantError);
  HostArena arena(memory.source(), 64);
  arena.take(1, at::kByte);
  EXPECT_THROW(arena.take(1, at::kFloat), InvariantError) << "a float would lie across";
}

TEST(CopyEndToEnd, CutsWhereEitherSideIsCut) {
  const at::Tensor all = at::arange(24, at::kFloat);
  const std::vector<at::Tensor> from{all.narrow(0, 0, 6).view({2, 3}), all.narrow(0, 6, 0),
                                     all.narrow(0, 6, 12).view({4, 3}), all.narrow(0, 18, 6)};
  for (const auto& cuts : {std::vector<int64_t>{24}, {1, 23}, {6, 12, 6}, {5, 0, 7, 8, 4}}) {
    std::vector<at::Tensor> to;
    for (const int64_t n : cuts) to.push_back(at::full({n}, -1, at::kFloat));
    copy_end_to_end(from, to);
    EXPECT_TRUE(at::equal(at::cat(to), all)) << cuts.size();
  }
  EXPECT_THROW(copy_end_to_end(from, {at::empty({23})}), InvariantError);
  EXPECT_THROW(copy_end_to_end(from, {at::empty({25})}), InvariantError);
  EXPECT_NO_THROW(copy_end_to_end({}, {}));
}

TEST(Cuda, AnArenaIsPageLocked) {
  MOEGRAFT_NEEDS_GPU();
  HostArena arena(HostArena::page_locked, 1 << 20);
  for (const at::Tensor& t : arena.take(3 << 19, at::kByte)) EXPECT_TRUE(t.is_pinned());
}

}  // namespace
}  // namespace moegraft::model
