#pragma once
// Which of the library's attention kernels serves packed sequences on a GPU, and why: the one place. Plain host code,
// tested without a GPU.

#include <cstdint>
#include <optional>
#include <string>

#include "../attention.h"

namespace moegraft::kernels {

enum class DeviceAttention { flash, cudnn };

struct AttentionShape {
  bool bfloat16 = true;
  int64_t heads = 1, groups = 1, head_dim = 64, window = 0;
  int64_t sequences = 1, queries = 1, keys = 1;  // rows of all sequences together
  int64_t longest_q = 1, longest_kv = 1;
  int generation = 9;         // compute capability, major
  int64_t cudnn_version = 0;  // as cudnnGetVersion() has it; 0: built without cudnn-frontend's headers
};

// All but what the machine and the build are.
AttentionShape attention_shape(const AttentionProblem& problem);

// Sizes that a cuDNN plan is made for: a plan takes a noticeable part of a second to make, and serves every smaller
// problem.
struct AttentionBucket {
  int64_t sequences, longest_q, longest_kv, queries, keys;
  bool operator==(const AttentionBucket&) const = default;
};
AttentionBucket bucket_of(const AttentionShape& shape);
// What cuDNN's deterministic backward pass holds on Hopper: every score's gradient of the bucket in 2 bytes
// (cudnn-frontend 1.32, node/scaled_dot_product_flash_attention.h; its ordered accumulation, which needs none, begins
// with cuDNN 9.25).
int64_t deterministic_workspace_bytes(const AttentionBucket& bucket, int64_t heads);

struct AttentionChoice {
  DeviceAttention kernel;
  std::string why;
};
// cuDNN where it is wanted and serves; flash otherwise. Nothing wanted: the default.
AttentionChoice choose_attention(const AttentionShape& shape, std::optional<DeviceAttention> wanted);
// What prefer_device_attention said.
std::optional<DeviceAttention> wanted_attention();

}  // namespace moegraft::kernels
