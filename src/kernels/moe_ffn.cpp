// The expert FFN as one autograd function: which implementation computes it, and what its backward pass wants.

#include <algorithm>

#include "factor_cache.h"
#include "implementations.h"
#include "moe.h"
#include "moegraft/base/check.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Implementation {
  bool (*serves)(const MoeProblem&);
  MoeForward (*forward)(const MoeProblem&, bool save, bool keep_hidden);
  MoeGradients (*backward)(const MoeProblem&, const std::vector<at::Tensor>& saved, const at::Tensor& dout_XD,
                           const MoeNeeds&);
};
constexpr Implementation kImplementations[]{
    {[](const MoeProblem& p) { return !has_row_weights(p) && moe_cuda_serves(p); }, moe_forward_cuda,
     moe_backward_cuda},
    {moe_blocks_serve, moe_forward_blocks, moe_backward_blocks},
    {kAlways, moe_forward_aten, moe_backward_aten},
};

struct Node : torch::CustomClassHolder {
  MoeProblem problem;
  const Implementation* implementation = nullptr;
  bool save = false, keep_hidden = false;
};

constexpr size_t kFactorInputs = 5;  // x, weights, stacked gate, up, down come first; then each term's A, B and, where
                                     // it has them, its rows' weights

class MoeFfn : public torch::autograd::Function<MoeFfn> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const c10::intrusive_ptr<Node>& node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    MoeForward result = node->implementation->forward(node->problem, node->save, node->keep_hidden);
    ctx->save_for_backward(result.saved);
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    if (!node->keep_hidden) return {result.out_XD};
    ctx->mark_non_differentiable({result.hidden_RF});
    return {result.out_XD, result.hidden_RF};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto node = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule());
    const MoeProblem& p = node->problem;
    MoeNeeds needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2), {}};
    size_t input = kFactorInputs;
    for (int s = 0; s < kSites; ++s)
      for (const ExpertLowRank& term : p.terms[s]) {
        needs.factors[s].push_back(ctx->needs_input_grad(input) || ctx->needs_input_grad(input + 1));
        input += 2;
        needs.row_weights[s].push_back(term.weight_X.defined() && ctx->needs_input_grad(input++));
      }
    const MoeGradients g = node->implementation->backward(p, ctx->get_saved_variables(), grads[0].contiguous(), needs);
    variable_list out{g.x_XD, g.weights_XK, g.gate_EFD, g.up_EFD, g.down_EDF};
    for (int s = 0; s < kSites; ++s)
      for (size_t i = 0; i < p.terms[s].size(); ++i) {
        out.push_back(g.factors[s][i].first), out.push_back(g.factors[s][i].second);
        if (p.terms[s][i].weight_X.defined()) out.push_back(g.row_weights[s][i]);
      }
    out.emplace_back();  // node
    return out;
  }
};

const std::vector<ExpertLowRank>& site_list(const ExpertFfnAdapters& adapters, int site) {
  return site == kGate ? adapters.gate : site == kUp ? adapters.up : adapters.down;
}

}  // namespace

std::shared_ptr<FactorCache> make_factor_cache() { return std::make_shared<FactorCache>(); }

at::Tensor moe_ffn(const at::Tensor& x_XD, const at::Tensor& weights_XK, const Dispatch& dispatch,
                   const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters, at::Tensor* hidden_RF) {
  RECORD_FUNCTION("moegraft::moe_ffn", {});
  MOEGRAFT_INVARIANT(weights.num_experts() == dispatch.num_experts && dispatch.row_of_slot_TK.size(0) == x_XD.size(0) &&
                         weights_XK.sizes() == dispatch.row_of_slot_TK.sizes(),
                     "moe_ffn: ", weights.num_experts(), " experts for ", dispatch.num_experts, ", x ", x_XD.sizes(),
                     ", weights ", weights_XK.sizes(), ", slots ", dispatch.row_of_slot_TK.sizes());
  const auto wide = x_XD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor routing = weights_XK.to(wide);
  auto node = c10::make_intrusive<Node>();
  MoeProblem& p = node->problem;
  p.x_XD = x_XD.detach().contiguous();
  p.weights_XK = routing.detach().contiguous();
  p.dispatch = dispatch;
  p.weights = weights;
  // Leaves are inputs of the function; the problem holds them without their history.
  const auto stacked = [&](at::Tensor& t) {
    const at::Tensor input = t.defined() ? t : at::empty({0}, x_XD.options().requires_grad(false));
    if (t.defined()) t = t.detach();
    return input;
  };
  for (auto* list : {&p.weights.gate_FD, &p.weights.up_FD, &p.weights.down_DF})
    if (std::any_of(list->begin(), list->end(), [](const at::Tensor& t) { return t.requires_grad(); }))
      for (auto& t : list->own()) t = t.detach();
  std::vector<at::Tensor> inputs{x_XD, routing, stacked(p.weights.gate_EFD), stacked(p.weights.up_EFD),
                                 stacked(p.weights.down_EDF)};
  for (int s = 0; s < kSites; ++s)
    for (const auto& term : site_list(adapters, s)) {
      MOEGRAFT_INVARIANT(int64_t(term.acts.size()) == dispatch.num_groups, "moe_ffn: ", term.acts.size(), " flags for ",
                         dispatch.num_groups, " groups");
      inputs.push_back(term.A_EPX);
      inputs.push_back(term.B_EXP);
      p.terms[s].push_back({term.A_EPX.detach().contiguous(), term.B_EXP.detach().contiguous(), term.scale, term.acts});
      if (!term.weight_X.defined()) continue;
      MOEGRAFT_INVARIANT(term.weight_X.dim() == 1 && term.weight_X.size(0) == x_XD.size(0), "moe_ffn: weights ",
                         term.weight_X.sizes(), " of the rows of x ", x_XD.sizes());
      inputs.push_back(term.weight_X.to(wide));
      p.terms[s].back().weight_X = inputs.back().detach().contiguous();
    }
  node->implementation = &choose(kImplementations, p);
  MOEGRAFT_INVARIANT(node->implementation->forward != moe_forward_aten || !p.weights.gate_FD.empty(),
                     "moe_ffn: no path for quantised experts with x ", p.x_XD.toString(),
                     " and factors that are no float32 masters");
  node->keep_hidden = hidden_RF != nullptr;
  for (const auto& t : inputs) node->save |= t.requires_grad();
  node->save &= at::GradMode::is_enabled();
  if (!node->save) {
    p.cache = adapters.cache;
    at::AutoDispatchBelowADInplaceOrView guard;
    const MoeForward result = node->implementation->forward(p, false, node->keep_hidden);
    if (hidden_RF) *hidden_RF = result.hidden_RF;
    return result.out_XD;
  }
  const auto outputs = MoeFfn::apply(at::TensorList(inputs), node);
  if (hidden_RF) *hidden_RF = outputs[1];
  return outputs[0];
}

at::Tensor moe_ffn_reference(const at::Tensor& x_XD, const at::Tensor& weights_XK, const Dispatch& d,
                             const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters) {
  const auto dtype = x_XD.scalar_type();
  const auto offsets = d.host_offsets();
  const at::Tensor x_RD = x_XD.index_select(0, d.token_of_row_R);
  std::vector<at::Tensor> parts;
  for (int64_t e = 0; e < d.num_experts; ++e)
    for (int64_t m = 0; m < d.num_groups; ++m) {
      const int64_t begin = offsets[e * d.num_groups + m], count = offsets[e * d.num_groups + m + 1] - begin;
      const at::Tensor tokens = d.token_of_row_R.narrow(0, begin, count);
      const auto project = [&](const at::Tensor& in, const at::Tensor& stacked, const std::vector<at::Tensor>& list,
                               const std::vector<ExpertLowRank>& terms) {
        at::Tensor out = at::matmul(in, (stacked.defined() ? stacked[e] : list[e]).t());
        for (const auto& term : terms) {
          if (!term.acts[m]) continue;
          at::Tensor t = at::matmul(in, term.A_EPX[e].to(dtype).t());
          if (term.weight_X.defined()) t = t * term.weight_X.index_select(0, tokens).to(dtype).unsqueeze(1);
          out = out + term.scale * at::matmul(t, term.B_EXP[e].to(dtype).t());
        }
        return out;
      };
      const at::Tensor x = x_RD.narrow(0, begin, count);
      const at::Tensor h = at::silu(project(x, weights.gate_EFD, weights.gate_FD, adapters.gate)) *
                           project(x, weights.up_EFD, weights.up_FD, adapters.up);
      parts.push_back(project(h, weights.down_EDF, weights.down_DF, adapters.down));
    }
  return (rows_of_slots(at::cat(parts, 0), d) * weights_XK.to(dtype).unsqueeze(-1)).sum(1);
}

}  // namespace moegraft::kernels
