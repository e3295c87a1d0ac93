#pragma once
// What a linear regression from captions to pictures reaches on the retrieval tasks: a model that draws worse than this
// has learnt less than which words go with which pixels.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/evaluate/config.h"
#include "moegraft/evaluate/retrieval.h"
#include "moegraft/graft/grafted_model.h"

namespace moegraft::evaluate {

struct ProbeFit {
  int64_t features = 0;
  double lambda = 0, held_out_error = 0;    // mean squared error of a pixel on the pictures that chose lambda
  std::map<std::string, Ranking> rankings;  // by retrieval
};

struct Baselines {
  int64_t pictures = 0, captions = 0;         // learnt from
  std::map<std::string, int64_t> candidates;  // by retrieval: what chance is
  ProbeFit bag_of_words;                      // from how often each word occurs, scaled to unit length
  std::optional<ProbeFit> base_states;  // from means over its tokens of the base's last hidden states and embeddings
  double seconds = 0;
};

// Ridge regression to pixels averaged down to 12 x 12 (the codec's size where that is smaller), the penalty chosen on a
// tenth of the pictures. Prompts, pictures to choose among and the ranking are those of measure_retrieval. UserError: a
// manifest without captioned pictures, fewer than two of them.
Baselines measure_baselines(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                            const BaselineSection& section, const std::vector<RetrievalSection>& tasks);

}  // namespace moegraft::evaluate
