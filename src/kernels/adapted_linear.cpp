// Linear layers of the frozen base with low-rank terms on some of their rows. The host composes ATen operations; the
// device's path is one autograd function over all layers that share the input: all factors rounded in one launch, one
// thin product for all terms of a group, and their sums written into the base's outputs and gradients in place.

#include <algorithm>

#include "cpu/cpu.h"
#include "cuda/ops.h"
#include "implementations.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::vector<FrozenLinearWeight> base_of(const std::vector<AdaptedLinear>& layers) {
  std::vector<FrozenLinearWeight> weights;
  for (const auto& layer : layers) weights.push_back(layer.base);
  return weights;
}

struct AdaptedCall {
  const at::Tensor& x_XK;
  const std::vector<AdaptedLinear>& layers;
  const std::vector<at::Tensor>& rows_of_group;
};

at::Tensor rows_of(const at::Tensor& x, const at::Tensor& rows) { return rows.defined() ? x.index_select(0, rows) : x; }
// A thin product of these rows times their weights.
at::Tensor weigh(const at::Tensor& t_XP, const at::Tensor& weight_X, const at::Tensor& rows) {
  return weight_X.defined() ? (t_XP * rows_of(weight_X, rows).unsqueeze(1)).to(t_XP.scalar_type()) : t_XP;
}

std::vector<at::Tensor> compose(const AdaptedCall& call) {
  const auto& [x_XK, layers, rows_of_group] = call;
  std::vector<at::Tensor> out = frozen_linear(x_XK, base_of(layers));
  // A group's rows are gathered, and kept for the backward pass, once for all terms.
  std::vector<at::Tensor> gathered(rows_of_group.size());
  const auto rows_of_x = [&](int64_t g) {
    at::Tensor& rows = gathered[size_t(g)];
    if (!rows.defined()) rows = x_XK.index_select(0, rows_of_group[size_t(g)]);
    return rows;
  };
  for (size_t i = 0; i < layers.size(); ++i)
    for (const LinearLowRank& term : layers[i].terms) {
      const at::Tensor A = term.A_PK.to(x_XK.scalar_type()), B = term.B_NP.to(x_XK.scalar_type());
      const auto delta = [&](const at::Tensor& x, const at::Tensor& rows) {
        return at::linear(weigh(at::linear(x, A), term.weight_X, rows), B) * term.scale;
      };
      for (const int64_t g : term.groups) {
        const at::Tensor& rows = rows_of_group[size_t(g)];
        // Only the group's rows are touched; each index occurs once, so the sum has one order.
        out[i] = rows.defined() ? out[i].index_add(0, rows, delta(rows_of_x(g), rows)) : out[i] + delta(x_XK, rows);
      }
    }
  return out;
}

// A term where it acts: its layer, its number among all terms, and the columns of the group's thin product that are its
// own.
struct Acting {
  size_t layer, term;
  int64_t first_column, rank;
};
struct Node : torch::CustomClassHolder {
  struct Term {
    size_t layer;
    at::Tensor A_PK, B_NP;
    double scale;
    at::Tensor weight_X;
  };
  std::vector<FrozenLinearWeight> weights;
  std::vector<Term> terms;
  std::vector<at::Tensor> rows_of_group;    // of the groups on which something acts; undefined: every row
  std::vector<std::vector<Acting>> acting;  // of each of them
  int64_t columns(size_t group) const { return acting[group].back().first_column + acting[group].back().rank; }
};

c10::intrusive_ptr<Node> describe(const std::vector<AdaptedLinear>& layers,
                                  const std::vector<at::Tensor>& rows_of_group) {
  auto node = c10::make_intrusive<Node>();
  node->weights = base_of(layers);
  std::vector<std::vector<Acting>> acting(rows_of_group.size());
  for (size_t i = 0; i < layers.size(); ++i)
    for (const LinearLowRank& term : layers[i].terms) {
      for (const int64_t g : term.groups) {
        auto& here = acting[size_t(g)];
        here.push_back(
            {i, node->terms.size(), here.empty() ? 0 : here.back().first_column + here.back().rank, term.A_PK.size(0)});
      }
      node->terms.push_back({i, term.A_PK.detach(), term.B_NP.detach(), term.scale,
                             term.weight_X.defined() ? term.weight_X.detach() : at::Tensor()});
    }
  for (size_t g = 0; g < acting.size(); ++g) {
    if (acting[g].empty()) continue;
    node->rows_of_group.push_back(rows_of_group[g]);
    node->acting.push_back(std::move(acting[g]));
  }
  return node;
}

// y[rows] += factor * a b, or all of y.
void add_product(const at::Tensor& y, const at::Tensor& rows, const at::Tensor& a, const at::Tensor& b, double factor) {
  if (rows.defined())
    cuda::add_rows(at::mm(a, b), rows, y, factor);
  else
    at::Tensor(y).addmm_(a, b, 1, factor);
}

// What a backward pass wants beside the weights: of each group its rows of x, their thin products before the rows'
// weights, and the stacked A; then each term's B.
struct Forward {
  std::vector<at::Tensor> out, saved;
};
Forward forward_device(const at::Tensor& x, const Node& node) {
  Forward f;
  for (const auto& w : node.weights)
    f.out.push_back(
        at::linear(x, w.weight_NK.tensor(), w.bias_N.defined() ? std::optional<at::Tensor>(w.bias_N) : std::nullopt));
  std::vector<at::Tensor> B, stacked_A, to, from;
  for (const auto& term : node.terms) {
    B.push_back(at::empty(term.B_NP.sizes(), x.options()));
    to.push_back(B.back()), from.push_back(term.B_NP);
  }
  for (size_t g = 0; g < node.acting.size(); ++g) {
    stacked_A.push_back(at::empty({node.columns(g), x.size(1)}, x.options()));
    for (const Acting& a : node.acting[g])
      to.push_back(stacked_A.back().narrow(0, a.first_column, a.rank)), from.push_back(node.terms[a.term].A_PK);
  }
  at::_foreach_copy_(to, from);
  for (size_t g = 0; g < node.acting.size(); ++g) {
    const at::Tensor& rows = node.rows_of_group[g];
    const at::Tensor x_g = rows_of(x, rows), t = at::mm(x_g, stacked_A[g].t());
    for (const Acting& a : node.acting[g]) {
      const Node::Term& term = node.terms[a.term];
      add_product(f.out[a.layer], rows, weigh(t.narrow(1, a.first_column, a.rank), term.weight_X, rows), B[a.term].t(),
                  term.scale);
    }
    f.saved.insert(f.saved.end(), {x_g, t, stacked_A[g]});
  }
  f.saved.insert(f.saved.end(), B.begin(), B.end());
  return f;
}

// Undefined gradients count as zero. need_term, need_weight: of each term, its factors' and its rows' weights'.
variable_list backward_device(const Node& node, const variable_list& saved, const variable_list& dy, bool need_x,
                              const std::vector<bool>& need_term, const std::vector<bool>& need_weight) {
  at::Tensor dx;
  for (size_t i = 0; need_x && i < dy.size(); ++i) {
    if (!dy[i].defined()) continue;
    if (dx.defined())
      dx.addmm_(dy[i], node.weights[i].weight_NK.tensor());
    else
      dx = at::mm(dy[i], node.weights[i].weight_NK.tensor());
  }
  std::vector<at::Tensor> dA(node.terms.size()), dB(node.terms.size()), dweight(node.terms.size());
  const auto keep = [](at::Tensor& sum, const at::Tensor& part) { sum = sum.defined() ? sum + part : part; };
  const at::Tensor* B = saved.data() + 3 * node.acting.size();
  for (size_t g = 0; g < node.acting.size(); ++g) {
    const at::Tensor &x_g = saved[3 * g], &t = saved[3 * g + 1], &stacked_A = saved[3 * g + 2],
                     &rows = node.rows_of_group[g];
    const at::Tensor dt = at::empty_like(t);
    variable_list dy_g(dy.size());
    bool any_term = false;
    for (const Acting& a : node.acting[g]) {
      at::Tensor dt_a = dt.narrow(1, a.first_column, a.rank);
      if (!dy[a.layer].defined()) {
        dt_a.zero_();
        continue;
      }
      if (!dy_g[a.layer].defined()) dy_g[a.layer] = rows_of(dy[a.layer], rows);
      at::addmm_out(dt_a, dt_a, dy_g[a.layer], B[a.term], /*beta=*/0,
                    /*alpha=*/node.terms[a.term].scale);  // beta 0: what dt_a held is not read
      const Node::Term& term = node.terms[a.term];
      const at::Tensor t_a = t.narrow(1, a.first_column, a.rank);
      if (need_weight[a.term]) {  // <t, dt>
        const at::Tensor dots = (t_a.to(term.weight_X.scalar_type()) * dt_a).sum(1);
        if (!dweight[a.term].defined()) dweight[a.term] = at::zeros_like(term.weight_X);
        if (rows.defined())
          dweight[a.term].index_add_(0, rows, dots);
        else
          dweight[a.term].add_(dots);
      }
      if (term.weight_X.defined()) dt_a.mul_(rows_of(term.weight_X, rows).unsqueeze(1));
      if (!need_term[a.term]) continue;
      any_term = true;
      keep(dB[a.term], at::mm(dy_g[a.layer].t(), weigh(t_a, term.weight_X, rows))
                           .to(node.terms[a.term].B_NP.scalar_type())
                           .mul_(node.terms[a.term].scale));
    }
    if (any_term) {
      const at::Tensor stacked = at::mm(dt.t(), x_g).to(node.terms[node.acting[g][0].term].A_PK.scalar_type());
      for (const Acting& a : node.acting[g])
        if (dB[a.term].defined())
          keep(dA[a.term], stacked.narrow(0, a.first_column, a.rank).to(node.terms[a.term].A_PK.scalar_type()));
    }
    if (dx.defined()) add_product(dx, rows, dt, stacked_A, 1.0);
  }
  variable_list out{dx};
  for (size_t i = 0; i < node.terms.size(); ++i) {
    out.push_back(dA[i]), out.push_back(dB[i]);
    if (node.terms[i].weight_X.defined()) out.push_back(dweight[i]);
  }
  return out;
}

// Inputs: x, then each term's A, B and, where it has them, its rows' weights.
class AdaptedLinearFunction : public torch::autograd::Function<AdaptedLinearFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const c10::intrusive_ptr<Node>& node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    Forward f = forward_device(inputs[0].detach(), *node);
    ctx->save_for_backward(f.saved);
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    return f.out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto node = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule());
    std::vector<bool> need_term, need_weight;
    size_t input = 1;
    for (const Node::Term& term : node->terms) {
      need_term.push_back(ctx->needs_input_grad(input) || ctx->needs_input_grad(input + 1));
      input += 2;
      need_weight.push_back(term.weight_X.defined() && ctx->needs_input_grad(input++));
    }
    for (at::Tensor& dy : grads)
      if (dy.defined()) dy = dy.contiguous();
    variable_list out =
        backward_device(*node, ctx->get_saved_variables(), grads, ctx->needs_input_grad(0), need_term, need_weight);
    out.emplace_back();  // node
    return out;
  }
};

bool has_no_terms(const AdaptedCall& c) {
  return std::all_of(c.layers.begin(), c.layers.end(), [](const AdaptedLinear& l) { return l.terms.empty(); });
}
bool device_serves(const AdaptedCall& c) {
  const bool frozen = std::none_of(c.layers.begin(), c.layers.end(), [](const AdaptedLinear& l) {
    return !l.base.weight_NK.quantised() && recorded(l.base.weight_NK.tensor(), l.base.bias_N);
  });
  return frozen && cuda::serves(c.x_XK) && c.x_XK.dim() == 2;
}
std::vector<at::Tensor> run_device(const AdaptedCall& c) {
  RECORD_FUNCTION("moegraft::adapted_linear", {});
  const at::Tensor x = c.x_XK.contiguous();
  std::vector<at::Tensor> inputs{x};
  bool records = recorded(x);
  for (const auto& layer : c.layers)
    for (const LinearLowRank& term : layer.terms) {
      inputs.push_back(term.A_PK), inputs.push_back(term.B_NP);
      if (term.weight_X.defined()) inputs.push_back(term.weight_X);
      records |= recorded(term.A_PK, term.B_NP, term.weight_X);
    }
  const auto node = describe(c.layers, c.rows_of_group);
  return records ? AdaptedLinearFunction::apply(at::TensorList(inputs), node) : forward_device(x, *node).out;
}

struct Implementation {
  bool (*serves)(const AdaptedCall&);
  std::vector<at::Tensor> (*run)(const AdaptedCall&);
};
constexpr Implementation kImplementations[]{
    {has_no_terms, [](const AdaptedCall& c) { return frozen_linear(c.x_XK, base_of(c.layers)); }},
    {device_serves, run_device},
    {kAlways, compose},
};

}  // namespace

std::vector<at::Tensor> adapted_linear(const at::Tensor& x_XK, const std::vector<AdaptedLinear>& layers,
                                       const std::vector<at::Tensor>& rows_of_group) {
  const AdaptedCall call{x_XK, layers, rows_of_group};
  return choose(kImplementations, call).run(call);
}

}  // namespace moegraft::kernels
