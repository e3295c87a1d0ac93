#pragma once
// One optimizer step's sequences, dealt to processes and their micro-batches.

#include <cstdint>
#include <vector>

#include "moegraft/data/config.h"

namespace moegraft::data {

// Which part of every step is this process's: micro-batches of rank `rank` among world_size.
struct Share {
  int64_t accumulation = 1, rank = 0, world_size = 1;
  int64_t parts() const { return accumulation * world_size; }
};

// What computing a sequence costs, in units of 1/8192 of a token's linear work: its tokens, and a small quadratic term
// for attention, which at a sequence of 8192 tokens costs as much as all else (about 2k in a model of a few million
// active parameters, 15k in Qwen3-30B-A3B).
constexpr int64_t kAttentionTokens = 8192;
constexpr int64_t sequence_cost(int64_t tokens) { return tokens * (kAttentionTokens + tokens); }

// part_of[s] = rank * accumulation + micro-batch of sequence s.
struct Deal {
  std::vector<int64_t> part_of;
  std::vector<int64_t> tokens, cost;  // [parts]
};

// Longest first onto the part that costs least (Graham's LPT), among those that stay within an even share of the tokens
// plus longest_allowed; ties go to the earlier sequence and part. Parts are then given out in rounds of world_size, the
// dearest to the rank that has least: so micro-batch i costs about the same on every rank (they meet in collectives),
// and so does a rank's whole step. A function of its arguments but for share.rank.
Deal deal(const std::vector<int64_t>& lengths, const Share& share, int64_t longest_allowed);

// The most tokens that a micro-batch can have: an even share and one sequence. tokens_per_step when there is one part.
int64_t largest_micro_batch(const DataConfig& config, const Share& share);

}  // namespace moegraft::data
