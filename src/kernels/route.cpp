// Softmax and top k of the router in one pass over each token's logits, forwards and backwards: a kernel on a GPU, a
// loop on the CPU. ATen for float64.

#include "moegraft/kernels/route.h"

#include <algorithm>
#include <limits>

#include "cpu/cpu.h"
#include "cpu/loops.h"
#include "cuda/ops.h"
#include "implementations.h"
#include "libtorch.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kTokens = 64;  // of one task

Route forward_cpu(const at::Tensor& logits_TE, int64_t top_k, bool renormalise) {
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1);
  const at::Tensor in = logits_TE.contiguous();
  Route r{at::empty_like(in), at::empty({T, top_k}, in.options().dtype(at::kLong)),
          at::empty({T, top_k}, in.options())};
  const float* logits = in.const_data_ptr<float>();
  float *probs = r.probs_TE.mutable_data_ptr<float>(), *weights = r.topk_weights_TK.mutable_data_ptr<float>();
  int64_t* ids = r.topk_ids_TK.mutable_data_ptr<int64_t>();
  at::parallel_for(0, T, kTokens, [&](int64_t from, int64_t end) {
    const Loops<float>& l = loops<float>();
    for (int64_t t = from; t < end; ++t) {
      float *p = probs + t * E, *w = weights + t * top_k, largest = -3.0e38f, chosen = 0;
      int64_t* id = ids + t * top_k;
      const float total = l.softmax(logits + t * E, 1.0f, 0, E, E, p, &largest);
      l.from_float(p, 1.0f / total, p, E);
      l.top_k(p, E, top_k, id);
      for (int64_t k = 0; k < top_k; ++k) chosen += w[k] = p[id[k]];
      for (int64_t k = 0; renormalise && k < top_k; ++k) w[k] /= chosen;
    }
  });
  return r;
}

// Either gradient may be undefined.
at::Tensor backward_cpu(const Route& routed, const at::Tensor& dweights_TK, const at::Tensor& dprobs_TE,
                        bool renormalise) {
  const int64_t T = routed.probs_TE.size(0), E = routed.probs_TE.size(1), K = routed.topk_ids_TK.size(1);
  const at::Tensor dw_TK = dweights_TK.defined() ? dweights_TK.contiguous() : at::Tensor(),
                   dp_TE = dprobs_TE.defined() ? dprobs_TE.contiguous() : at::Tensor();
  at::Tensor dlogits_TE = at::empty_like(routed.probs_TE);
  const float *probs = routed.probs_TE.const_data_ptr<float>(),
              *weights = routed.topk_weights_TK.const_data_ptr<float>();
  const int64_t* ids = routed.topk_ids_TK.const_data_ptr<int64_t>();
  float* dlogits = dlogits_TE.mutable_data_ptr<float>();
  at::parallel_for(0, T, kTokens, [&](int64_t from, int64_t end) {
    const Loops<float>& l = loops<float>();
    std::vector<float> dp(static_cast<size_t>(E));
    for (int64_t t = from; t < end; ++t) {
      const float *p = probs + t * E, *w = weights + t * K;
      if (dp_TE.defined())
        std::copy_n(dp_TE.const_data_ptr<float>() + t * E, E, dp.begin());
      else
        std::fill(dp.begin(), dp.end(), 0.0f);
      if (dw_TK.defined()) {
        // w_k = p_k / s: the gradient of p_k is (dw_k - sum_j dw_j w_j) / s.
        const float* dw = dw_TK.const_data_ptr<float>() + t * K;
        float chosen = 1, mean = 0;
        if (renormalise) {
          chosen = 0;
          for (int64_t k = 0; k < K; ++k) chosen += p[ids[t * K + k]], mean += dw[k] * w[k];
        }
        for (int64_t k = 0; k < K; ++k) dp[size_t(ids[t * K + k])] += (dw[k] - mean) / chosen;
      }
      const float dot = l.dot(p, dp.data(), E);
      for (int64_t e = 0; e < E; ++e) dlogits[t * E + e] = p[e] * (dp[size_t(e)] - dot);
    }
  });
  return dlogits_TE;
}

struct OnePass {
  bool (*serves)(const at::Tensor& logits_TE);
  Route (*forward)(const at::Tensor& logits_TE, int64_t top_k, bool renormalise);
  at::Tensor (*backward)(const Route& routed, const at::Tensor& dweights_TK, const at::Tensor& dprobs_TE,
                         bool renormalise);
};
constexpr OnePass kOnePass[]{{cuda::serves, cuda::route_forward, cuda::route_backward},
                             {kAlways, forward_cpu, backward_cpu}};

class RouteFunction : public torch::autograd::Function<RouteFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, int64_t top_k, bool renormalise) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    const Route r = choose(kOnePass, logits).forward(logits, top_k, renormalise);
    ctx->save_for_backward({r.probs_TE, r.topk_ids_TK, r.topk_weights_TK});
    ctx->saved_data["renormalise"] = renormalise;
    ctx->mark_non_differentiable({r.topk_ids_TK});
    return {r.probs_TE, r.topk_ids_TK, r.topk_weights_TK};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    if (!grads[0].defined() && !grads[2].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    const auto& chosen = choose(kOnePass, saved[0]);
    return {
        chosen.backward({saved[0], saved[1], saved[2]}, grads[2], grads[0], ctx->saved_data["renormalise"].toBool()),
        at::Tensor(), at::Tensor()};
  }
};

Route in_one_pass(const at::Tensor& logits_TE, int64_t top_k, bool renormalise) {
  if (!recorded(logits_TE) && !cuda::serves(logits_TE)) return forward_cpu(logits_TE, top_k, renormalise);
  const variable_list r = RouteFunction::apply(logits_TE, top_k, renormalise);
  return {r[0], r[1], r[2]};
}

Route composed(const at::Tensor& logits_TE, int64_t top_k, bool renormalise) {
  const at::Tensor probs = at::softmax(logits_TE, -1), ids = std::get<1>(at::topk(probs.detach(), top_k, -1));
  at::Tensor weights = probs.gather(1, ids);
  if (renormalise) weights = weights / weights.sum(-1, true);
  return {probs, ids, weights};
}

struct Implementation {
  bool (*serves)(const at::Tensor& logits_TE);
  Route (*run)(const at::Tensor& logits_TE, int64_t top_k, bool renormalise);
};
constexpr Implementation kImplementations[]{
    {[](const at::Tensor& logits_TE) {
       return logits_TE.scalar_type() == at::kFloat && (cuda::serves(logits_TE) || logits_TE.is_cpu());
     },
     in_one_pass},
    {kAlways, composed},
};

}  // namespace

Route route(const at::Tensor& logits_TE, int64_t top_k, bool renormalise) {
  RECORD_FUNCTION("moegraft::route", {});
  MOEGRAFT_INVARIANT(logits_TE.dim() == 2 && top_k >= 1 && top_k <= logits_TE.size(1), "route: logits ",
                     logits_TE.sizes(), ", top ", top_k);
  return choose(kImplementations, logits_TE).run(logits_TE, top_k, renormalise);
}

Route route(const at::Tensor& logits_TE, int64_t top_k, const RouteRule& rule) {
  if (!rule.sigmoid && !rule.correction_E.defined() && rule.num_groups == 1 && rule.scale == 1.0)
    return route(logits_TE, top_k, rule.renormalise);
  RECORD_FUNCTION("moegraft::route", {});
  const int64_t E = logits_TE.size(1);
  MOEGRAFT_INVARIANT(
      top_k >= 1 && rule.num_groups >= 1 && E % rule.num_groups == 0 && top_k <= E / rule.num_groups * rule.topk_groups,
      "route: top ", top_k, " of ", E, " experts in ", rule.num_groups, " groups, of which ", rule.topk_groups,
      " are chosen from");
  const at::Tensor scores = rule.sigmoid ? at::sigmoid(logits_TE) : at::softmax(logits_TE, -1);
  at::Tensor ids;
  {
    const at::NoGradGuard no_grad;
    at::Tensor choice = rule.correction_E.defined() ? scores + rule.correction_E : scores;
    if (rule.num_groups > 1) {
      const at::Tensor groups_TGX = choice.view({-1, rule.num_groups, E / rule.num_groups});
      const at::Tensor best_TG = std::get<0>(groups_TGX.topk(std::min<int64_t>(2, groups_TGX.size(2)))).sum(-1);
      const at::Tensor open_TG =
          at::zeros_like(best_TG, at::kBool).scatter_(1, std::get<1>(best_TG.topk(rule.topk_groups)), true);
      choice = groups_TGX.masked_fill(open_TG.logical_not().unsqueeze(-1), -std::numeric_limits<double>::infinity())
                   .view_as(choice);
    }
    ids = std::get<1>(choice.topk(top_k));
    ids = ids.gather(1, std::get<1>(scores.gather(1, ids).sort(/*stable=*/true, -1, /*descending=*/true)));
  }
  at::Tensor weights = scores.gather(1, ids);
  if (rule.renormalise) weights = weights / (weights.sum(-1, true) + 1e-20);
  return {rule.sigmoid ? scores / scores.sum(-1, true) : scores, ids,
          rule.scale == 1.0 ? weights : weights * rule.scale};
}

}  // namespace moegraft::kernels
