#include "moegraft/evaluate/likelihood.h"

#include "libtorch.h"

#include <cmath>

#include "moegraft/model/device.h"

namespace moegraft::evaluate {

double Likelihood::total() const {
  double sum = 0, count = 0;
  for (size_t m = 0; m < nll_M.size(); ++m)
    if (labels_M[m] > 0) sum += nll_M[m] * double(labels_M[m]), count += double(labels_M[m]);
  return count > 0 ? sum / count : NAN;
}

Likelihood measure_likelihood(const graft::GraftedModel& model, data::EvalStream& stream, const model::ForwardOptions& options, const SumOverProcesses& sum) {
  at::NoGradGuard no_grad;
  const size_t sets = model.decoder->rows().size() + 1;
  std::vector<double> sums(2 * sets, 0.0);  // nll, then labels
  Likelihood out{std::vector<double>(sets, NAN), std::vector<int64_t>(sets, 0)};
  stream.rewind();
  while (const auto batch = stream.next()) {
    const model::PackedBatch b = model::to_device(*batch, model.device());
    const auto loss = model::cross_entropy_loss(*model.decoder, model.decoder->forward(b, options), b);
    const at::Tensor nll = loss.nll_sum_M.to(at::kCPU, at::kDouble);
    for (size_t m = 0; m < sets; ++m) sums[m] += nll[int64_t(m)].item<double>(), sums[sets + m] += double(loss.count_M[m]);
  }
  if (sum) sums = sum(sums);
  for (size_t m = 0; m < sets; ++m) out.labels_M[m] = int64_t(sums[sets + m]);
  for (size_t m = 0; m < sets; ++m)
    if (out.labels_M[m] > 0) out.nll_M[m] = sums[m] / double(out.labels_M[m]);
  return out;
}

}  // namespace moegraft::evaluate
