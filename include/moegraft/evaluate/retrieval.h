#pragma once
// Prompt retrieval: draw a picture from each caption and look which real picture is nearest in pixels.

#include <torch/types.h>

#include <filesystem>
#include <string>
#include <vector>

#include "moegraft/evaluate/config.h"
#include "moegraft/graft/grafted_model.h"

namespace moegraft::evaluate {

// Ranks from 1: how many candidates lie strictly nearer (mean squared error) than the right one, plus one. A tie counts
// against the right one unless the two pictures are the same. samples_N3HW, candidates_M3HW float32; target_N: index of
// the right candidate.
struct Ranking {
  std::vector<int64_t> rank_N, nearest_N;
  double top(int64_t k) const;  // share of ranks <= k
  double mean_rank() const;
};
Ranking rank_pictures(const at::Tensor& samples_N3HW, const at::Tensor& candidates_M3HW,
                      const std::vector<int64_t>& target_N);

// What guessing reaches.
double chance_of_top(int64_t k, int64_t candidates);

struct RetrievalItem {
  std::string caption, image, nearest;  // nearest: the candidate's file
  int64_t rank = 0;
};

struct Retrieval {
  std::vector<RetrievalItem> items;
  int64_t candidates = 0, skipped = 0;  // skipped: pictures that do not decode
  Ranking real, reconstructed;          // against the pictures, and against what the codec makes of them
  double seconds = 0;
};

// Candidates are brought to the codec's size. UserError: a manifest without captioned pictures; what generate_images
// says.
Retrieval measure_retrieval(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                            const RetrievalSection& options);

}  // namespace moegraft::evaluate
