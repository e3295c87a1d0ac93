// Softmax and top k of the router: one kernel each way on a GPU, ATen elsewhere.

#include "moegraft/kernels/route.h"

#include "cuda/ops.h"
#include "libtorch.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class RouteFunction : public torch::autograd::Function<RouteFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, int64_t top_k, bool renormalise) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    const cuda::Routed r = cuda::route_forward(logits, top_k, renormalise);
    ctx->save_for_backward({r.probs_TE, r.ids_TK, r.weights_TK});
    ctx->saved_data["renormalise"] = renormalise;
    ctx->mark_non_differentiable({r.ids_TK});
    return {r.probs_TE, r.ids_TK, r.weights_TK};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const bool used = grads[0].defined() || grads[2].defined();
    return {used ? cuda::route_backward({saved[0], saved[1], saved[2]}, grads[2], grads[0], ctx->saved_data["renormalise"].toBool()) : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Route route(const at::Tensor& logits_TE, int64_t top_k, bool renormalise) {
  RECORD_FUNCTION("moegraft::route", {});
  MOEGRAFT_INVARIANT(logits_TE.dim() == 2 && top_k >= 1 && top_k <= logits_TE.size(1), "route: logits ", logits_TE.sizes(), ", top ", top_k);
  if (cuda::serves(logits_TE) && logits_TE.scalar_type() == at::kFloat) {
    const variable_list r = RouteFunction::apply(logits_TE, top_k, renormalise);
    return {r[0], r[1], r[2]};
  }
  const at::Tensor probs = at::softmax(logits_TE, -1), ids = std::get<1>(at::topk(probs.detach(), top_k, -1));
  at::Tensor weights = probs.gather(1, ids);
  if (renormalise) weights = weights / weights.sum(-1, true);
  return {probs, ids, weights};
}

}  // namespace moegraft::kernels
