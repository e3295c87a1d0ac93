// What routing statistics add up: two kernels on a GPU, ATen elsewhere.

#include <algorithm>
#include <cmath>

#include "cuda/ops.h"
#include "implementations.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/route.h"

namespace moegraft::kernels {

namespace {

struct Call {
  const at::Tensor &sums_MX, &probs_TE, &topk_ids_TK,
      &modality_T;  // probabilities in float32; modality_T undefined: all 0
};

void add_aten(const Call& c) {
  const int64_t E = c.probs_TE.size(1), num_modalities = c.sums_MX.size(0);
  const auto selected_TE = at::zeros_like(c.probs_TE).scatter_(1, c.topk_ids_TK, 1.0);
  const auto scale = E > 1 ? 1.0 / std::log(double(E)) : 1.0;
  const auto entropy_T1 = at::special_entr(c.probs_TE).sum(1, /*keepdim=*/true).mul_(scale);
  const auto top_T2 = std::get<0>(c.probs_TE.topk(std::min<int64_t>(2, E), 1));
  const auto margin_T1 = E > 1 ? top_T2.narrow(1, 0, 1) - top_T2.narrow(1, 1, 1) : top_T2.narrow(1, 0, 1);
  const auto rows_TX = at::cat({selected_TE, c.probs_TE, at::ones_like(margin_T1), entropy_T1, margin_T1}, 1);
  if (!c.modality_T.defined()) {
    c.sums_MX[0].add_(rows_TX.sum(0, false, at::kDouble));
    return;
  }
  // A product with the one-hot modalities: float32 counts are exact below 2^24 tokens a call.
  const auto one_hot_MT =
      (c.modality_T.unsqueeze(0) == at::arange(num_modalities, c.modality_T.options()).unsqueeze(1)).to(at::kFloat);
  c.sums_MX.add_(at::mm(one_hot_MT, rows_TX));
}

struct Implementation {
  bool (*serves)(const Call&);
  void (*run)(const Call&);
};
constexpr Implementation kImplementations[]{
    {[](const Call& c) { return cuda::serves(c.probs_TE); },
     [](const Call& c) { cuda::add_routing_sums(c.sums_MX, c.probs_TE, c.topk_ids_TK, c.modality_T); }},
    {kAlways, add_aten},
};

}  // namespace

void add_routing_sums(const at::Tensor& sums_MX, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK,
                      const at::Tensor& modality_T) {
  RECORD_FUNCTION("moegraft::routing_sums", {});
  MOEGRAFT_INVARIANT(sums_MX.size(1) == 2 * probs_TE.size(1) + 3 && sums_MX.scalar_type() == at::kDouble &&
                         topk_ids_TK.size(0) == probs_TE.size(0),
                     "routing sums: ", sums_MX.sizes(), ", probabilities ", probs_TE.sizes(), ", ids ",
                     topk_ids_TK.sizes());
  const at::Tensor p_TE = probs_TE.to(at::kFloat), modality = sums_MX.size(0) > 1 ? modality_T : at::Tensor();
  const Call call{sums_MX, p_TE, topk_ids_TK, modality};
  choose(kImplementations, call).run(call);
}

}  // namespace moegraft::kernels
