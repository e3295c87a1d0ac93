#include "moegraft/evaluate/likelihood.h"

#include "libtorch.h"

#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/model/device.h"

namespace moegraft::evaluate {
namespace {

constexpr int64_t kLabelsAtOnce = 1024;  // logits of a codebook of 16384: 64 MiB

}  // namespace

double Likelihood::total() const {
  double sum = 0, count = 0;
  for (size_t m = 0; m < nll_M.size(); ++m)
    if (labels_M[m] > 0) sum += nll_M[m] * double(labels_M[m]), count += double(labels_M[m]);
  return count > 0 ? sum / count : NAN;
}

Likelihood measure_likelihood(const graft::GraftedModel& model, data::EvalStream& stream,
                              const model::ForwardOptions& options, const SumOverProcesses& sum) {
  at::NoGradGuard no_grad;
  const size_t sets = model.decoder->rows().size() + 1;
  std::vector<double> sums(2 * sets, 0.0);  // nll, then labels
  Likelihood out{std::vector<double>(sets, NAN), std::vector<int64_t>(sets, 0)};
  stream.rewind();
  while (const auto batch = stream.next()) {
    const model::PackedBatch b = model::to_device(*batch, model.device());
    const auto loss = model::cross_entropy_loss(*model.decoder, model.decoder->forward(b, options), b);
    const at::Tensor nll = loss.nll_sum_M.to(at::kCPU, at::kDouble);
    for (size_t m = 0; m < sets; ++m)
      sums[m] += nll[int64_t(m)].item<double>(), sums[sets + m] += double(loss.count_M[m]);
  }
  if (sum) sums = sum(sums);
  for (size_t m = 0; m < sets; ++m) out.labels_M[m] = int64_t(sums[sets + m]);
  for (size_t m = 0; m < sets; ++m)
    if (out.labels_M[m] > 0) out.nll_M[m] = sums[m] / double(out.labels_M[m]);
  return out;
}

std::vector<double> sequence_nll(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                                 const std::vector<data::Sequence>& sequences) {
  const at::NoGradGuard no_grad;
  const auto& rows = model.decoder->rows();
  int64_t set = 0;
  while (set < int64_t(rows.size()) && rows[size_t(set)].modality != tokens.modality) ++set;
  MOEGRAFT_CHECK(set < int64_t(rows.size()), "the model has no rows for ", tokens.name);

  std::vector<int64_t> positions, labels, owners;
  int64_t first = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int64_t t = 0; t < sequences[s].size(); ++t) {
      const int64_t label = sequences[s].labels[size_t(t)] - tokens.first_id;
      if (label < 0 || label >= tokens.num_rows()) continue;
      positions.push_back(first + t), labels.push_back(label), owners.push_back(int64_t(s));
    }
    first += sequences[s].size();
  }
  std::vector<double> sums(sequences.size(), 0.0);
  if (positions.empty()) return sums;
  const at::Tensor hidden_TD =
      model.decoder->forward(model::to_device(data::pack(sequences), model.device())).hidden_TD;
  const at::Tensor hidden_XD = hidden_TD.index_select(0, at::tensor(positions, at::kLong).to(model.device())),
                   labels_X1 = at::tensor(labels, at::kLong).to(model.device()).unsqueeze(1);
  std::vector<at::Tensor> parts;
  for (int64_t x = 0; x < hidden_XD.size(0); x += kLabelsAtOnce) {
    const int64_t count = std::min(kLabelsAtOnce, hidden_XD.size(0) - x);
    const at::Tensor logits_XN = model.decoder->modality_logits(hidden_XD.narrow(0, x, count), set).to(at::kFloat);
    parts.push_back(logits_XN.logsumexp(1) - logits_XN.gather(1, labels_X1.narrow(0, x, count)).squeeze(1));
  }
  const at::Tensor nll_X = at::cat(parts).to(at::kCPU, at::kDouble);
  for (size_t x = 0; x < owners.size(); ++x) sums[size_t(owners[x])] += nll_X.const_data_ptr<double>()[x];
  return sums;
}

}  // namespace moegraft::evaluate
