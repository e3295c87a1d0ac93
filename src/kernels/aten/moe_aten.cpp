// The expert FFN through ATen: every device and dtype, and experts that train. Chunks of one (expert, group); on the
// CPU chunks are spread over the threads.

#include "../cpu/cpu.h"
#include "../moe.h"

namespace moegraft::kernels {
namespace {

constexpr int64_t kChunkRows = 256;

struct Task {
  int64_t expert, group, begin, rows;
};

std::vector<Task> make_tasks(const Dispatch& d, const std::vector<int64_t>& offsets) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < d.num_experts; ++e)
    for (int64_t g = 0; g < d.num_groups; ++g) {
      const int64_t end = offsets[e * d.num_groups + g + 1];
      for (int64_t at = offsets[e * d.num_groups + g]; at < end; at += kChunkRows)
        tasks.push_back({e, g, at, std::min(kChunkRows, end - at)});
    }
  return tasks;
}

// Rows [begin, ..) of a thin product times their weights.
at::Tensor weigh(at::Tensor t, const at::Tensor& weight_R, int64_t begin) {
  return weight_R.defined() ? t.mul_(weight_R.narrow(0, begin, t.size(0)).unsqueeze(1)) : t;
}

// The low-rank terms of one site in the compute dtype.
struct Site {
  std::vector<ExpertLowRank> terms;
  std::vector<at::Tensor> weight_R;  // of each term: undefined where it has no weights
  Site(const std::vector<ExpertLowRank>& list, at::ScalarType dtype, const Dispatch& d) : terms(list) {
    for (auto& term : terms) {
      term.A_EPX = term.A_EPX.to(dtype), term.B_EXP = term.B_EXP.to(dtype);
      weight_R.push_back(term.weight_X.defined() ? term.weight_X.index_select(0, d.token_of_row_R) : at::Tensor());
    }
  }
  // y += scale w (x A^T) B^T; x and y are rows [begin, ..).
  void add(int64_t expert, int64_t group, int64_t begin, const at::Tensor& x, at::Tensor y) const {
    for (size_t i = 0; i < terms.size(); ++i)
      if (const auto& t = terms[i]; t.acts[group])
        y.addmm_(weigh(at::mm(x, t.A_EPX[expert].t()), weight_R[i], begin), t.B_EXP[expert].t(), 1.0, t.scale);
  }
  // dx += scale w (dy B) A
  void add_backward(int64_t expert, int64_t group, int64_t begin, const at::Tensor& dy, at::Tensor dx) const {
    for (size_t i = 0; i < terms.size(); ++i)
      if (const auto& t = terms[i]; t.acts[group])
        dx.addmm_(weigh(at::mm(dy, t.B_EXP[expert]), weight_R[i], begin), t.A_EPX[expert], 1.0, t.scale);
  }
};

at::ScalarType wide_of(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A slot without a row points at one more row, past the last.
at::Tensor slot_index(const Dispatch& d) {
  const at::Tensor flat = d.row_of_slot_TK.reshape({-1}).to(at::kLong);
  return d.num_rows() == flat.size(0) ? flat : flat.masked_fill(flat < 0, d.num_rows());
}

}  // namespace

at::Tensor rows_of_slots(const at::Tensor& y_RD, const Dispatch& d) {
  const bool all = d.num_rows() == d.row_of_slot_TK.numel();
  const at::Tensor rows = all ? y_RD : at::cat({y_RD, y_RD.new_zeros({1, y_RD.size(1)})}, 0);
  return rows.index_select(0, slot_index(d)).view({d.row_of_slot_TK.size(0), d.top_k, y_RD.size(1)});
}

at::Tensor slots_to_rows(const at::Tensor& slots_XK, const Dispatch& d) {
  return at::empty({d.num_rows() + 1}, slots_XK.options())
      .index_copy_(0, slot_index(d), slots_XK.reshape({-1}))
      .narrow(0, 0, d.num_rows());
}

MoeForward moe_forward_aten(const MoeProblem& p, bool save, bool keep_hidden) {
  const at::Tensor x = p.x_XD.index_select(0, p.dispatch.token_of_row_R);
  const auto dtype = x.scalar_type();
  const Site gate(p.terms[kGate], dtype, p.dispatch), up(p.terms[kUp], dtype, p.dispatch),
      down(p.terms[kDown], dtype, p.dispatch);
  at::Tensor g = at::empty({x.size(0), p.expert_width()}, x.options()), u = at::empty_like(g), y = at::empty_like(x),
             hidden = keep_hidden ? at::empty_like(g) : at::Tensor();
  const auto tasks = make_tasks(p.dispatch, p.dispatch.host_offsets());
  run_tasks(int64_t(tasks.size()), x.is_cpu(), [&](int64_t i) {
    const auto [e, m, begin, count] = tasks[i];
    const auto part = [&, begin = begin, count = count](const at::Tensor& t) { return t.narrow(0, begin, count); };
    const at::Tensor xi = part(x);
    at::Tensor gi = part(g), ui = part(u), yi = part(y);
    at::mm_out(gi, xi, p.weights.gate_FD[e].t());
    at::mm_out(ui, xi, p.weights.up_FD[e].t());
    gate.add(e, m, begin, xi, gi);
    up.add(e, m, begin, xi, ui);
    const at::Tensor h = at::silu(gi).mul_(ui);
    at::mm_out(yi, h, p.weights.down_DF[e].t());
    down.add(e, m, begin, h, yi);
    if (keep_hidden) part(hidden).copy_(h);
  });
  MoeForward out;
  out.out_XD = (rows_of_slots(y, p.dispatch).to(wide_of(x)) * p.weights_XK.unsqueeze(-1)).sum(1).to(dtype);
  out.hidden_RF = hidden;
  if (save) out.saved = {g, u};
  return out;
}

namespace {

void expert_gradients(const MoeProblem& p, const std::vector<int64_t>& offsets, const at::Tensor& x,
                      const at::Tensor& h, const at::Tensor& dg, const at::Tensor& du, const at::Tensor& dy,
                      MoeGradients& out) {
  const Dispatch& d = p.dispatch;
  out.gate_EFD = at::empty(p.weights.gate_EFD.sizes(), x.options());
  out.up_EFD = at::empty(p.weights.up_EFD.sizes(), x.options());
  out.down_EDF = at::empty(p.weights.down_EDF.sizes(), x.options());
  run_tasks(3 * d.num_experts, x.is_cpu(), [&](int64_t i) {
    const int64_t e = i / 3, begin = offsets[e * d.num_groups], count = offsets[(e + 1) * d.num_groups] - begin;
    at::Tensor target = (i % 3 == 0 ? out.gate_EFD : i % 3 == 1 ? out.up_EFD : out.down_EDF)[e];
    if (count == 0) return void(target.zero_());
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, begin, count); };
    if (i % 3 == 0)
      at::mm_out(target, part(dg).t(), part(x));
    else if (i % 3 == 1)
      at::mm_out(target, part(du).t(), part(x));
    else
      at::mm_out(target, part(dy).t(), part(h));
  });
}

// Of factors and of the rows' weights; sites: gate, up, down.
void term_gradients(const MoeProblem& p, const std::array<const Site*, kSites>& sites,
                    const std::vector<int64_t>& offsets, const MoeNeeds& needs, const at::Tensor& x,
                    const at::Tensor& h, const at::Tensor& dg, const at::Tensor& du, const at::Tensor& dy,
                    MoeGradients& out) {
  struct Job {
    int site;
    size_t term;
    int64_t expert;
  };
  const Dispatch& d = p.dispatch;
  const auto dtype = x.scalar_type();
  std::vector<Job> jobs;
  std::array<std::vector<at::Tensor>, kSites> dweight_R;
  for (int s = 0; s < kSites; ++s)
    for (size_t t = 0; t < p.terms[s].size(); ++t) {
      out.factors[s].emplace_back();
      dweight_R[s].emplace_back();
      // Masters are float32 (or the compute dtype): gradients leave in the factor's own dtype.
      if (needs.factors[s][t])
        out.factors[s][t] = {at::zeros_like(p.terms[s][t].A_EPX), at::zeros_like(p.terms[s][t].B_EXP)};
      if (needs.row_weight(s, t)) dweight_R[s][t] = at::zeros({d.num_rows()}, p.weights_XK.options());
      for (int64_t e = 0; (needs.factors[s][t] || needs.row_weight(s, t)) && e < d.num_experts; ++e)
        jobs.push_back({s, t, e});
    }
  run_tasks(int64_t(jobs.size()), x.is_cpu(), [&](int64_t i) {
    const Job& job = jobs[i];
    const auto& term = p.terms[job.site][job.term];
    const at::Tensor &weight_R = sites[job.site]->weight_R[job.term], &dweight = dweight_R[job.site][job.term];
    for (int64_t m = 0; m < d.num_groups; ++m) {
      const int64_t begin = offsets[job.expert * d.num_groups + m],
                    count = offsets[job.expert * d.num_groups + m + 1] - begin;
      if (count == 0 || !term.acts[m]) continue;
      const auto part = [&](const at::Tensor& t) { return t.narrow(0, begin, count); };
      const at::Tensor in = part(job.site == kDown ? h : x), dout = part(job.site == kGate ? dg
                                                                         : job.site == kUp ? du
                                                                                           : dy);
      const at::Tensor dt = at::mm(dout, term.B_EXP[job.expert].to(dtype)),
                       t = at::mm(in, term.A_EPX[job.expert].to(dtype).t());  // [n,P]
      if (dweight.defined())
        part(dweight).copy_((t.to(dweight.scalar_type()) * dt.to(dweight.scalar_type())).sum(1).mul_(term.scale));
      if (!needs.factors[job.site][job.term]) continue;
      auto& [dA, dB] = out.factors[job.site][job.term];
      dA[job.expert].add_(at::mm(weigh(dt, weight_R, begin).t(), in), term.scale);
      dB[job.expert].add_(at::mm(dout.t(), weigh(t, weight_R, begin)), term.scale);
    }
  });
  for (int s = 0; s < kSites; ++s)
    for (const at::Tensor& dweight : dweight_R[s])
      out.row_weights[s].push_back(dweight.defined() ? rows_of_slots(dweight.unsqueeze(1), d).sum(1).squeeze(1)
                                                     : at::Tensor());
}

}  // namespace

MoeGradients moe_backward_aten(const MoeProblem& p, const std::vector<at::Tensor>& saved, const at::Tensor& dout_XD,
                               const MoeNeeds& needs) {
  const Dispatch& d = p.dispatch;
  const at::Tensor &g = saved[0], &u = saved[1], x = p.x_XD.index_select(0, d.token_of_row_R);
  const auto dtype = x.scalar_type();
  const auto wide = wide_of(x);
  const Site gate(p.terms[kGate], dtype, d), up(p.terms[kUp], dtype, d), down(p.terms[kDown], dtype, d);
  const at::Tensor w_R = slots_to_rows(p.weights_XK, d);
  const at::Tensor dy_plain =
      dout_XD.index_select(0, d.token_of_row_R);  // before the row's weight: <h, dh> is the weight's gradient
  const at::Tensor dy = (dy_plain.to(wide) * w_R.unsqueeze(-1)).to(dtype);
  const at::Tensor h = at::silu(g).mul_(u);
  at::Tensor dg = at::empty_like(g), du = at::empty_like(u), dx = needs.x ? at::empty_like(x) : at::Tensor(),
             dw_R = at::empty({x.size(0)}, p.weights_XK.options());
  const auto offsets = d.host_offsets();
  const auto tasks = make_tasks(d, offsets);
  run_tasks(int64_t(tasks.size()), x.is_cpu(), [&](int64_t i) {
    const auto [e, m, begin, count] = tasks[i];
    const auto part = [&, begin = begin, count = count](const at::Tensor& t) { return t.narrow(0, begin, count); };
    const at::Tensor dyi = part(dy_plain), gi = part(g), hi = part(h);
    at::Tensor dh = at::mm(dyi, p.weights.down_DF[e]);
    down.add_backward(e, m, begin, dyi, dh);
    part(dw_R).copy_((hi.to(wide) * dh.to(wide)).sum(1));
    dh = (dh.to(wide) * part(w_R).unsqueeze(-1)).to(dtype);
    part(dg).copy_(at::silu_backward(dh * part(u), gi));
    part(du).copy_(dh * at::silu(gi));
    if (!needs.x) return;
    at::Tensor dxi = part(dx);
    at::mm_out(dxi, part(dg), p.weights.gate_FD[e]);
    dxi.addmm_(part(du), p.weights.up_FD[e]);
    gate.add_backward(e, m, begin, part(dg), dxi);
    up.add_backward(e, m, begin, part(du), dxi);
  });
  MoeGradients out;
  if (needs.x) out.x_XD = rows_of_slots(dx, d).sum(1);
  if (needs.weights) out.weights_XK = rows_of_slots(dw_R.unsqueeze(1), d).view_as(p.weights_XK);
  if (needs.experts) expert_gradients(p, offsets, x, h, dg, du, dy, out);
  term_gradients(p, {&gate, &up, &down}, offsets, needs, x, h, dg, du, dy, out);
  return out;
}

}  // namespace moegraft::kernels
