#pragma once
// Which of many captions does a picture have, and which of many pictures a caption, by the likelihood of the picture's
// codes: shows what a model understands long before what it draws comes near the right picture.

#include <optional>
#include <vector>

#include "moegraft/evaluate/config.h"
#include "moegraft/evaluate/retrieval.h"
#include "moegraft/graft/grafted_model.h"

namespace moegraft::evaluate {

// Rankings of the directions that were asked for; nearest_N as prompt_N. Candidates of a prompt are itself and the
// first of a shuffled order that differ from it in caption and codes.
struct LikelihoodRanking {
  std::vector<int64_t> prompt_N;  // which captioned picture was asked about, of those read from the manifest (all in
                                  // its order, unless it holds far more than needed)
  std::vector<int64_t> candidates_N;    // fewer than asked for where the manifest holds no more
  std::optional<Ranking> captions;      // image -> caption
  std::optional<Ranking> pictures;      // caption -> image
  std::optional<Ranking> pictures_pmi;  // by the likelihood with the caption over that without: pictures differ in how
                                        // likely they are anyway
  double seconds = 0;
  double chance(int64_t k) const;  // of a rank <= k by guessing
};

// Only codes and end count. Ties count against the right one. UserError: no captioned picture, no two that differ, a
// caption beyond the model's positions.
LikelihoodRanking rank_likelihoods(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                                   const RankingSection& section);

}  // namespace moegraft::evaluate
