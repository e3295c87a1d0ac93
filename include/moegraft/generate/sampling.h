#pragma once
// From one row of logits to one id.

#include <cstdint>
#include <span>
#include <vector>

#include "moegraft/base/rng.h"

namespace moegraft::generate {

// Applied in transformers' order: temperature, top-k, top-p.
struct SamplingOptions {
  double temperature = 1.0;  // 0: greedy, the lowest id wins a tie and nothing is drawn
  int64_t top_k = 0;         // 0: off; scores equal to the k-th are kept too
  double top_p = 1.0;        // 1: off; the smallest set of most likely ids whose mass reaches top_p
  void validate() const;     // UsageError names the value that is out of range
};

// How the tokens after a prompt are computed, one per sequence and step. plain: each step as it comes. recorded: one
// CUDA graph, replayed (model::FixedStep; UsageError where that cannot be). fixed: what would be recorded, run
// operation by operation on any device. automatic: fixed on a GPU, where a plain step describes its batch to the host
// and copies keys and values sequence by sequence in every layer; plain on the CPU, whose attention reads no further
// than a sequence is long.
enum class DecodeSteps { automatic, plain, fixed, recorded };

// What sample() draws from: sums to 1, exactly 0 where filtered or where the logit is -inf. UserError: NaN, +inf, or
// nothing left.
std::vector<double> probabilities(std::span<const float> logits, const SamplingOptions& options);

// An index into `logits`. Inverse transform in id order with one rng.uniform(): logits that differ in their last bits
// almost never change the draw.
int64_t sample(std::span<const float> logits, const SamplingOptions& options, Rng& rng);

}  // namespace moegraft::generate
