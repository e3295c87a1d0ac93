// The SwiGLU experts on rows sorted by (expert, group), with low-rank terms on the groups that they act on.
//
// Work is cut into tasks of at most kChunkRows rows of one (expert, group). The cut depends on shapes alone, never on the adapters, so a call
// whose rows are all text gives the base's bits. Weight gradients are summed per expert over whole row ranges, in a fixed order.

#include "cpu.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kChunkRows = 256;

struct Task {
  int64_t expert, group, begin, rows;
};

std::vector<Task> make_tasks(const Dispatch& d) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < d.num_experts; ++e)
    for (int64_t g = 0; g < d.num_groups; ++g) {
      const int64_t end = d.offsets[e * d.num_groups + g + 1];
      for (int64_t at = d.offsets[e * d.num_groups + g]; at < end; at += kChunkRows) tasks.push_back({e, g, at, std::min(kChunkRows, end - at)});
    }
  return tasks;
}

// The low-rank terms of one site in the compute dtype.
struct Site {
  struct Term {
    at::Tensor A, B;  // compute dtype, detached
    double scale;
    std::vector<bool> acts;
  };
  std::vector<Term> terms;

  bool acts(int64_t group) const {
    for (const auto& term : terms)
      if (term.acts[group]) return true;
    return false;
  }
  // y += scale (x A^T) B^T
  void add(int64_t expert, int64_t group, const at::Tensor& x, at::Tensor y) const {
    for (const auto& term : terms)
      if (term.acts[group]) y.addmm_(at::mm(x, term.A[expert].t()), term.B[expert].t(), 1.0, term.scale);
  }
  // dx += scale (dy B) A
  void add_backward(int64_t expert, int64_t group, const at::Tensor& dy, at::Tensor dx) const {
    for (const auto& term : terms)
      if (term.acts[group]) dx.addmm_(at::mm(dy, term.B[expert]), term.A[expert], 1.0, term.scale);
  }
};

Site make_site(const std::vector<ExpertLowRank>& list, const std::vector<at::Tensor>& factors, size_t& next, at::ScalarType dtype) {
  Site site;
  for (const auto& item : list) {
    site.terms.push_back({factors[next].to(dtype), factors[next + 1].to(dtype), item.scale, item.acts});
    next += 2;
  }
  return site;
}

// silu'(g) with sigma = sigmoid(g): sigma (1 + g (1 - sigma))
struct Hidden {
  at::Tensor dg, du;
};
Hidden swiglu_backward(const at::Tensor& g, const at::Tensor& u, const at::Tensor& dh) {
  return {at::silu_backward(dh * u, g), dh * at::silu(g)};
}

// Everything the two passes share, kept by the autograd node.
struct Plan : torch::CustomClassHolder {
  Dispatch dispatch;
  std::vector<at::Tensor> gate_FD, up_FD, down_DF;
  ExpertFfnAdapters adapters;  // scales and groups; the factors come as autograd inputs
};

const std::vector<ExpertLowRank>* site_list(const ExpertFfnAdapters& adapters, int site) {
  return site == 0 ? &adapters.gate : site == 1 ? &adapters.up : &adapters.down;
}

class ExpertFfn : public torch::autograd::Function<ExpertFfn> {
 public:
  // inputs: x, stacked gate/up/down (undefined when frozen), then A, B of each term of gate, up, down.
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const c10::intrusive_ptr<Plan>& plan, bool keep_hidden) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor x = inputs[0].contiguous();
    const std::vector<at::Tensor> factors(inputs.begin() + 4, inputs.end());
    const int64_t rows = x.size(0), width = plan->gate_FD.front().size(0);
    size_t next = 0;
    const Site gate = make_site(plan->adapters.gate, factors, next, x.scalar_type()), up = make_site(plan->adapters.up, factors, next, x.scalar_type()),
               down = make_site(plan->adapters.down, factors, next, x.scalar_type());
    at::Tensor g = at::empty({rows, width}, x.options()), u = at::empty_like(g), y = at::empty({rows, x.size(1)}, x.options());
    at::Tensor h_all = keep_hidden ? at::empty_like(g) : at::Tensor();
    const auto tasks = make_tasks(plan->dispatch);
    run_tasks(int64_t(tasks.size()), x.is_cpu(), [&](int64_t i) {
      const auto [e, m, begin, count] = tasks[i];
      const auto part = [&, begin = begin, count = count](const at::Tensor& t) { return t.narrow(0, begin, count); };
      const at::Tensor xi = part(x);
      at::Tensor gi = part(g), ui = part(u), yi = part(y);
      at::mm_out(gi, xi, plan->gate_FD[e].t());
      at::mm_out(ui, xi, plan->up_FD[e].t());
      gate.add(e, m, xi, gi);
      up.add(e, m, xi, ui);
      const at::Tensor h = at::silu(gi).mul_(ui);
      at::mm_out(yi, h, plan->down_DF[e].t());
      down.add(e, m, h, yi);
      if (keep_hidden) part(h_all).copy_(h);
    });
    variable_list saved{x, g, u};
    saved.insert(saved.end(), factors.begin(), factors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["plan"] = c10::IValue::make_capsule(plan);
    if (keep_hidden) {
      ctx->mark_non_differentiable({h_all});
      return {y, h_all};
    }
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const auto plan = c10::static_intrusive_pointer_cast<Plan>(ctx->saved_data["plan"].toCapsule());
    const at::Tensor &x = saved[0], &g = saved[1], &u = saved[2], dy = grads[0].contiguous();
    const std::vector<at::Tensor> factors(saved.begin() + 3, saved.end());
    size_t next = 0;
    const Site gate = make_site(plan->adapters.gate, factors, next, x.scalar_type()), up = make_site(plan->adapters.up, factors, next, x.scalar_type()),
               down = make_site(plan->adapters.down, factors, next, x.scalar_type());
    const bool need_x = ctx->needs_input_grad(0), full = ctx->needs_input_grad(1);
    at::Tensor dg = at::empty_like(g), du = at::empty_like(u), dx = need_x ? at::empty_like(x) : at::Tensor();
    const auto tasks = make_tasks(plan->dispatch);
    run_tasks(int64_t(tasks.size()), x.is_cpu(), [&](int64_t i) {
      const auto [e, m, begin, count] = tasks[i];
      const auto part = [&, begin = begin, count = count](const at::Tensor& t) { return t.narrow(0, begin, count); };
      const at::Tensor dyi = part(dy);
      at::Tensor dh = at::mm(dyi, plan->down_DF[e]);
      down.add_backward(e, m, dyi, dh);
      const Hidden d = swiglu_backward(part(g), part(u), dh);
      part(dg).copy_(d.dg);
      part(du).copy_(d.du);
      if (!need_x) return;
      at::Tensor dxi = part(dx);
      at::mm_out(dxi, d.dg, plan->gate_FD[e]);
      dxi.addmm_(d.du, plan->up_FD[e]);
      gate.add_backward(e, m, d.dg, dxi);
      up.add_backward(e, m, d.du, dxi);
    });

    variable_list out(4 + factors.size());
    out[0] = dx;
    if (full) weight_gradients(*plan, x, g, u, dg, du, dy, out);
    factor_gradients(ctx, *plan, {gate, up, down}, x, g, u, dg, du, dy, factors, out);
    out.resize(out.size() + 2);  // plan, keep_hidden
    return out;
  }

 private:
  static void weight_gradients(const Plan& plan, const at::Tensor& x, const at::Tensor& g, const at::Tensor& u, const at::Tensor& dg, const at::Tensor& du, const at::Tensor& dy,
                               variable_list& out) {
    const Dispatch& d = plan.dispatch;
    const int64_t width = g.size(1), model = x.size(1);
    out[1] = at::empty({d.num_experts, width, model}, x.options());
    out[2] = at::empty({d.num_experts, width, model}, x.options());
    out[3] = at::empty({d.num_experts, model, width}, x.options());
    run_tasks(3 * d.num_experts, x.is_cpu(), [&](int64_t i) {
      const int64_t e = i / 3, begin = d.offsets[e * d.num_groups], count = d.offsets[(e + 1) * d.num_groups] - begin;
      at::Tensor target = out[1 + i % 3][e];
      if (count == 0) return void(target.zero_());
      const auto part = [&](const at::Tensor& t) { return t.narrow(0, begin, count); };
      if (i % 3 == 0) at::mm_out(target, part(dg).t(), part(x));
      else if (i % 3 == 1) at::mm_out(target, part(du).t(), part(x));
      else at::mm_out(target, part(dy).t(), at::silu(part(g)).mul_(part(u)));
    });
  }

  static void factor_gradients(AutogradContext* ctx, const Plan& plan, const std::array<Site, 3>& sites, const at::Tensor& x, const at::Tensor& g, const at::Tensor& u, const at::Tensor& dg,
                               const at::Tensor& du, const at::Tensor& dy, const std::vector<at::Tensor>& factors, variable_list& out) {
    struct Job {
      int site;
      size_t term, input;  // input: index of A among the autograd inputs; B follows
      int64_t expert;
    };
    const Dispatch& d = plan.dispatch;
    std::vector<Job> jobs;
    size_t input = 4;
    for (int s = 0; s < 3; ++s)
      for (size_t t = 0; t < sites[s].terms.size(); ++t, input += 2) {
        if (!ctx->needs_input_grad(input) && !ctx->needs_input_grad(input + 1)) continue;
        // Masters are float32 (or the compute dtype): gradients leave in the factor's own dtype.
        out[input] = at::zeros_like(factors[input - 4]);
        out[input + 1] = at::zeros_like(factors[input - 3]);
        for (int64_t e = 0; e < d.num_experts; ++e) jobs.push_back({s, t, input, e});
      }
    run_tasks(int64_t(jobs.size()), x.is_cpu(), [&](int64_t i) {
      const Job& job = jobs[i];
      const auto& term = sites[job.site].terms[job.term];
      at::Tensor dA = out[job.input][job.expert], dB = out[job.input + 1][job.expert];
      for (int64_t m = 0; m < d.num_groups; ++m) {
        const int64_t begin = d.offsets[job.expert * d.num_groups + m], count = d.offsets[job.expert * d.num_groups + m + 1] - begin;
        if (count == 0 || !term.acts[m]) continue;
        const auto part = [&](const at::Tensor& t) { return t.narrow(0, begin, count); };
        const at::Tensor in = job.site == 2 ? at::silu(part(g)).mul_(part(u)) : part(x);
        const at::Tensor dout = part(job.site == 0 ? dg : job.site == 1 ? du : dy);
        const at::Tensor dt = at::mm(dout, term.B[job.expert]);           // [n,P]
        const at::Tensor t = at::mm(in, term.A[job.expert].t());          // [n,P]
        dA.add_(at::mm(dt.t(), in), term.scale);
        dB.add_(at::mm(dout.t(), t), term.scale);
      }
    });
  }
};

}  // namespace

at::Tensor expert_ffn(const at::Tensor& x_RD, const Dispatch& dispatch, const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters, at::Tensor* hidden_RF) {
  MOEGRAFT_INVARIANT(int64_t(weights.gate_FD.size()) == dispatch.num_experts && x_RD.size(0) == dispatch.offsets.back(), "expert_ffn: ", weights.gate_FD.size(), " experts, x ", x_RD.sizes());
  auto plan = c10::make_intrusive<Plan>();
  plan->dispatch = dispatch;
  const auto detach = [](const std::vector<at::Tensor>& list) {
    std::vector<at::Tensor> out;
    for (const auto& t : list) out.push_back(t.detach());
    return out;
  };
  plan->gate_FD = detach(weights.gate_FD);
  plan->up_FD = detach(weights.up_FD);
  plan->down_DF = detach(weights.down_DF);
  const auto stacked = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, x_RD.options()); };
  std::vector<at::Tensor> inputs{x_RD, stacked(weights.gate_EFD), stacked(weights.up_EFD), stacked(weights.down_EDF)};
  for (int s = 0; s < 3; ++s)
    for (const auto& term : *site_list(adapters, s)) {
      MOEGRAFT_INVARIANT(int64_t(term.acts.size()) == dispatch.num_groups, "expert_ffn: groups");
      inputs.push_back(term.A_EPX);
      inputs.push_back(term.B_EXP);
    }
  const auto strip = [](std::vector<ExpertLowRank> list) {
    for (auto& term : list) term.A_EPX = term.B_EXP = at::Tensor();
    return list;
  };
  plan->adapters = {strip(adapters.gate), strip(adapters.up), strip(adapters.down)};
  const auto outputs = ExpertFfn::apply(at::TensorList(inputs), plan, hidden_RF != nullptr);
  if (hidden_RF) *hidden_RF = outputs[1];
  return outputs[0];
}

at::Tensor expert_ffn_reference(const at::Tensor& x_RD, const Dispatch& d, const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters) {
  const auto dtype = x_RD.scalar_type();
  std::vector<at::Tensor> parts;
  for (int64_t e = 0; e < d.num_experts; ++e)
    for (int64_t m = 0; m < d.num_groups; ++m) {
      const int64_t begin = d.offsets[e * d.num_groups + m], count = d.offsets[e * d.num_groups + m + 1] - begin;
      const auto project = [&](const at::Tensor& in, const at::Tensor& stacked, const std::vector<at::Tensor>& list, const std::vector<ExpertLowRank>& terms) {
        at::Tensor out = at::matmul(in, (stacked.defined() ? stacked[e] : list[e]).t());
        for (const auto& term : terms)
          if (term.acts[m]) out = out + term.scale * at::matmul(at::matmul(in, term.A_EPX[e].to(dtype).t()), term.B_EXP[e].to(dtype).t());
        return out;
      };
      const at::Tensor x = x_RD.narrow(0, begin, count);
      const at::Tensor h = at::silu(project(x, weights.gate_EFD, weights.gate_FD, adapters.gate)) * project(x, weights.up_EFD, weights.up_FD, adapters.up);
      parts.push_back(project(h, weights.down_EDF, weights.down_DF, adapters.down));
    }
  return at::cat(parts, 0);
}

}  // namespace moegraft::kernels
