// Which attention kernel serves on a GPU, and what cuDNN's is given: all of it that needs no GPU.
#include "kernels/cuda/attention_choice.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/cuda/host_run.h"
#include "kernels/cuda/sequence_kernels.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/device_numerics.h"

namespace moegraft::kernels {
namespace {

// Qwen3-30B-A3B on an H200: one packed batch of 8 sequences.
AttentionShape usual() {
  AttentionShape s;
  s.heads = 32, s.groups = 4, s.head_dim = 128;
  s.sequences = 8, s.queries = s.keys = 4096, s.longest_q = s.longest_kv = 512;
  s.generation = 9, s.cudnn_version = 91900;
  return s;
}

TEST(AttentionChoice, FlashUnlessCudnnIsAskedForAndServes) {
  EXPECT_EQ(choose_attention(usual(), std::nullopt).kernel, DeviceAttention::flash)
      << "the default until both have been compared";
  EXPECT_EQ(choose_attention(usual(), DeviceAttention::flash).kernel, DeviceAttention::flash);
  EXPECT_EQ(choose_attention(usual(), DeviceAttention::cudnn).kernel, DeviceAttention::cudnn);
  const std::vector<std::tuple<std::function<void(AttentionShape&)>, DeviceAttention, const char*>> table{
      {[](AttentionShape& s) { s.cudnn_version = 0; }, DeviceAttention::flash, "headers"},
      {[](AttentionShape& s) { s.cudnn_version = 91002; }, DeviceAttention::flash, "older"},
      {[](AttentionShape& s) { s.generation = 8; }, DeviceAttention::flash, "8.x"},
      {[](AttentionShape& s) { s.generation = 12; }, DeviceAttention::flash, "12.x"},
      {[](AttentionShape& s) { s.generation = 10; }, DeviceAttention::cudnn, ""},
      {[](AttentionShape& s) { s.bfloat16 = false; }, DeviceAttention::flash, "bfloat16"},
      {[](AttentionShape& s) { s.head_dim = 72; }, DeviceAttention::flash, "heads of 72"},
      {[](AttentionShape& s) { s.head_dim = 256; }, DeviceAttention::flash, "heads of 256"},
      {[](AttentionShape& s) { s.window = 128; }, DeviceAttention::cudnn, ""},
      {[](AttentionShape& s) { s.queries = 0; }, DeviceAttention::flash, "no rows"},
      {[](AttentionShape& s) { s.queries = s.keys = int64_t{1} << 20; }, DeviceAttention::flash, "32 bits"},
      // 2 bytes for every pair of 8 x 32 heads x 4096 x 4096: 8 GiB.
      {[](AttentionShape& s) { s.longest_q = s.longest_kv = 4096, s.queries = s.keys = 8 * 4096; },
       DeviceAttention::flash, "8192 MiB"},
      {[](AttentionShape& s) { s.sequences = 1, s.longest_q = s.longest_kv = 4096; }, DeviceAttention::cudnn, ""},
  };
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& [change, expected, word] = table[i];
    AttentionShape s = usual();
    change(s);
    const AttentionChoice choice = choose_attention(s, DeviceAttention::cudnn);
    EXPECT_EQ(choice.kernel, expected) << "row " << i << ": " << choice.why;
    EXPECT_NE(choice.why.find(word), std::string::npos) << choice.why;
  }
}

TEST(AttentionChoice, IsWantedByName) {
  EXPECT_EQ(wanted_attention(), std::nullopt);
  prefer_device_attention("cudnn", "--attention");
  EXPECT_EQ(wanted_attention(), DeviceAttention::cudnn);
  prefer_device_attention("auto", "--attention");
  EXPECT_EQ(wanted_attention(), std::nullopt);
  try {
    prefer_device_attention("fa3", "--attention");
    ADD_FAILURE() << "fa3 was taken";
  } catch (const UsageError& e) {
    EXPECT_STREQ(e.what(), "--attention must be one of auto, flash, cudnn, got \"fa3\"");
  }
}

TEST(AttentionChoice, BucketsHoldTheirProblemsAndAreFew) {
  std::set<int64_t> lengths, sequences;
  for (int64_t n = 1; n <= 9000; ++n) {
    AttentionShape s = usual();
    s.sequences = s.longest_q = s.longest_kv = s.queries = s.keys = n;
    const AttentionBucket b = bucket_of(s);
    EXPECT_GE(b.sequences, n);
    EXPECT_GE(b.longest_q, n);
    EXPECT_GE(b.longest_kv, n);
    EXPECT_GE(b.queries, n);
    EXPECT_GE(b.keys, n);
    EXPECT_EQ(b.longest_q % 128, 0);
    EXPECT_LT(b.longest_q, std::max<int64_t>(129, 2 * n));
    lengths.insert(b.longest_q);
    sequences.insert(b.sequences);
  }
  EXPECT_LE(lengths.size(), 12u);
  EXPECT_LE(sequences.size(), 15u);
  AttentionShape s = usual();
  EXPECT_EQ(bucket_of(s), (AttentionBucket{8, 512, 512, 4096, 4096}));
  EXPECT_EQ(deterministic_workspace_bytes(bucket_of(s), s.heads), int64_t{8} * 32 * 512 * 512 * 2);
}

TEST(AttentionChoice, AProblemsShape) {
  const AttentionProblem p{at::empty({9, 4, 16}, at::kBFloat16),
                           at::empty({14, 2, 16}, at::kBFloat16),
                           at::empty({14, 2, 16}, at::kBFloat16),
                           {0, 3, 3, 9},
                           {0, 8, 8, 14},
                           5,
                           0.25};
  const AttentionShape s = attention_shape(p);
  EXPECT_TRUE(s.bfloat16);
  EXPECT_EQ(std::tuple(s.heads, s.groups, s.head_dim, s.window, s.sequences), std::tuple(4, 2, 16, 5, 3));
  EXPECT_EQ(std::tuple(s.queries, s.keys, s.longest_q, s.longest_kv), std::tuple(9, 14, 6, 8));
}

TEST(AttentionChoice, RaggedOffsetsCountElementsAndTheBucketsRestIsEmpty) {
  const at::Tensor cu_q = at::tensor({0, 3, 3, 9}, at::kInt), cu_kv = at::tensor({0, 8, 8, 14}, at::kInt),
                   out = at::full({5, 5}, -1, at::kInt);
  int32_t* to = out.data_ptr<int32_t>();
  cuda::OnHost::threads(cuda::SequenceOffsets{cu_q.const_data_ptr<int32_t>(), cu_kv.const_data_ptr<int32_t>(), 3, 4, 64,
                                              32, 4, to, to + 5, to + 10, to + 15, to + 20},
                        5);
  EXPECT_TRUE(at::equal(out[0].narrow(0, 0, 4), at::tensor({3, 0, 6, 0}, at::kInt)));
  EXPECT_TRUE(at::equal(out[1].narrow(0, 0, 4), at::tensor({8, 0, 6, 0}, at::kInt)));
  EXPECT_TRUE(at::equal(out[2], at::tensor({0, 3, 3, 9, 9}, at::kInt) * 64));
  EXPECT_TRUE(at::equal(out[3], at::tensor({0, 8, 8, 14, 14}, at::kInt) * 32));
  EXPECT_TRUE(at::equal(out[4], at::tensor({0, 3, 3, 9, 9}, at::kInt) * 4));
}

#ifndef MOEGRAFT_HAVE_CUDA
TEST(AttentionChoice, ABuildWithoutCudaHasNone) { EXPECT_EQ(describe_device_attention(), ""); }
#endif

}  // namespace
}  // namespace moegraft::kernels
