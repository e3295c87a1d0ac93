#pragma once
// Teacher-forced likelihood on held-out data, by modality.

#include <functional>
#include <vector>

#include "moegraft/data/sequence.h"
#include "moegraft/data/stream.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/model/decoder.h"

namespace moegraft::evaluate {

struct Likelihood {
  std::vector<double> nll_M;  // mean negative log-likelihood in nats per label, text first; NaN without labels
  std::vector<int64_t> labels_M;
  double total() const;  // over all labels
};

// One pass over the stream from its start. Labels are normalised over their own modality's rows. Observers see every
// batch. sum: over processes that share the stream (data::Share); empty: this one has all of it.
using SumOverProcesses = std::function<std::vector<double>(const std::vector<double>&)>;
Likelihood measure_likelihood(const graft::GraftedModel& model, data::EvalStream& stream,
                              const model::ForwardOptions& options = {}, const SumOverProcesses& sum = {});

// Nats of each sequence's labels of one modality (others are not counted), in one pass over all of them packed.
// UserError when the model has no rows for it.
std::vector<double> sequence_nll(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                                 const std::vector<data::Sequence>& sequences);

}  // namespace moegraft::evaluate
