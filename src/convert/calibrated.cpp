#include "calibrated.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/ot/kmeans.h"

namespace moegraft::convert {
namespace {

constexpr double kActiveShare = 0.1;  // of the neurons that are not shared: those that count as active on a token
constexpr double kRidge = 1e-2;       // of the inputs' mean square
constexpr double kRouterSpread =
    0.01;  // standard deviation of an analytic router's logits: weights within a few percent of 1 / top_k
constexpr int64_t kRows = 512;  // tokens at a time, where intermediate results are several times [rows, N]

// What each neuron adds to the output, per token: |activation| * |column of down|.
at::Tensor contributions(const DenseFfn& ffn) {
  const at::Tensor gate = ffn.gate_ND.to(at::kFloat).t(), up = ffn.up_ND.to(at::kFloat).t(),
                   down_N = ffn.down_DN.to(at::kFloat).norm(2, {0});
  std::vector<at::Tensor> parts;
  for (const at::Tensor& x : ffn.x_TD.split(kRows))
    parts.push_back(at::silu(x.mm(gate)).mul_(x.mm(up)).abs_().mul_(down_N));
  return at::cat(parts);
}

}  // namespace

NeuronGroups group_neurons(const DenseFfn& ffn, int64_t experts, int64_t shared, uint64_t seed) {
  const int64_t N = ffn.gate_ND.size(0), own = (N - shared) / experts;
  MOEGRAFT_INVARIANT(shared >= 0 && own > 0 && shared + experts * own == N, "group_neurons: ", N, " neurons as ",
                     shared, " and ", experts, " times ", own);
  const at::Tensor strength_TN = contributions(ffn);
  const at::Tensor share_N = strength_TN.t().mv(strength_TN.sum(1).clamp_min(1e-30).reciprocal());
  const at::Tensor order = std::get<1>(share_N.sort(/*stable=*/true, 0, /*descending=*/true));
  NeuronGroups groups;
  groups.shared_S = std::get<0>(order.narrow(0, 0, shared).sort());
  const at::Tensor rest = std::get<0>(order.narrow(0, shared, N - shared).sort()),
                   rest_TR = strength_TN.index_select(1, rest);

  const int64_t active = std::max<int64_t>(1, int64_t(kActiveShare * double(N - shared)));
  const at::Tensor markers_TR = at::zeros_like(rest_TR).scatter_(1, std::get<1>(rest_TR.topk(active, 1)), 1.0);
  const auto clusters = ot::kmeans(markers_TR.t().contiguous(), experts,
                                   {.restarts = 1, .max_iterations = 20, .balanced = true, .seed = seed});
  groups.own_EO =
      rest.index_select(0, std::get<1>(clusters.assignment_N.sort(/*stable=*/true, 0, false))).view({experts, own});
  groups.strength_TE = strength_TN.index_select(1, groups.own_EO.flatten()).view({-1, experts, own}).sum(2);
  return groups;
}

at::Tensor analytic_router(const at::Tensor& x_TD, const at::Tensor& strength_TE) {
  const at::Tensor x = x_TD.to(at::kDouble),
                   target = strength_TE.to(at::kDouble) -
                            strength_TE.to(at::kDouble).mean(1, true);  // only differences choose
  at::Tensor gram_DD = x.t().mm(x);
  gram_DD.diagonal().add_(kRidge * gram_DD.diagonal().mean());
  const at::Tensor rows_ED = at::linalg_solve(gram_DD, x.t().mm(target)).t();
  return (rows_ED * (kRouterSpread / x.mm(rows_ED.t()).std().clamp_min(1e-30))).to(at::kFloat);
}

at::Tensor kmeans_router(const at::Tensor& x_TD, int64_t rows, double std, uint64_t seed) {
  const at::Tensor directions = x_TD / x_TD.norm(2, {1}, true).clamp_min(1e-20);
  const at::Tensor centres =
      ot::kmeans(directions.contiguous(), rows, {.restarts = 1, .balanced = true, .seed = seed}).centres_KD;
  const at::Tensor centred = centres - centres.mean(0, true);  // one row: zeros, as good as any
  return centred * (std * x_TD.square().sum(1).mean().sqrt() / x_TD.mm(centred.t()).std(0).mean().clamp_min(1e-30));
}

}  // namespace moegraft::convert
