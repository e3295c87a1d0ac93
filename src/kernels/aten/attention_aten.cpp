// Attention by the library's own functions, a call per sequence: CPUs without block products, float64, and devices that
// have nothing of ours.

#include "../attention.h"

#include <limits>

#include "../cpu/cpu.h"

namespace moegraft::kernels {
namespace {

at::Tensor heads_first(const at::Tensor& x_SGC, int64_t repeat) {  // [S,G,C] -> [1,G*repeat,S,C]
  const at::Tensor x = x_SGC.transpose(0, 1).unsqueeze(0);
  if (repeat == 1) return x;
  const auto s = x.sizes();
  return x.unsqueeze(2).expand({1, s[1], repeat, s[2], s[3]}).reshape({1, s[1] * repeat, s[2], s[3]});
}

// True where query i (absolute position kv - queries + i) may see key j. Undefined when plain causal (or full)
// attention says the same.
at::Tensor window_mask(int64_t queries, int64_t keys, int64_t window, const at::Device& device) {
  const bool windowed = window > 0 && keys > window;
  if (!windowed && (queries == 1 || queries == keys)) return {};
  const at::Tensor i = at::arange(keys - queries, keys, at::TensorOptions(at::kLong).device(device)).unsqueeze(1);
  const at::Tensor j = at::arange(keys, at::TensorOptions(at::kLong).device(device)).unsqueeze(0);
  at::Tensor seen = j <= i;
  if (windowed) seen = seen & (j > i - window);
  return seen;
}

at::Tensor additive(const at::Tensor& mask, at::ScalarType dtype) {
  if (!mask.defined()) return {};
  return at::zeros(mask.sizes(), mask.options().dtype(dtype))
      .masked_fill_(mask.logical_not(), -std::numeric_limits<double>::infinity())
      .unsqueeze(0)
      .unsqueeze(0);
}

std::optional<at::Tensor> optional(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

}  // namespace

AttentionOutput attention_forward_aten(const AttentionProblem& p) {
  const int64_t repeat = p.heads() / p.groups();
  AttentionOutput out{at::empty(p.q_THC.sizes(), p.q_THC.options()),
                      at::empty({p.q_THC.size(0), p.heads()}, p.q_THC.options().dtype(at::kFloat))};
  run_tasks(p.num_sequences(), true, [&](int64_t i) {
    const int64_t begin = p.cu_q[i], queries = p.cu_q[i + 1] - begin, first = p.cu_kv[i], keys = p.cu_kv[i + 1] - first;
    if (queries == 0) return;
    const at::Tensor mask = window_mask(queries, keys, p.window, p.q_THC.device());
    const auto [o, l] = at::_scaled_dot_product_flash_attention_for_cpu(
        heads_first(p.q_THC.narrow(0, begin, queries), 1), heads_first(p.k_SGC.narrow(0, first, keys), repeat),
        heads_first(p.v_SGC.narrow(0, first, keys), repeat), 0.0, !mask.defined(),
        optional(additive(mask, p.q_THC.scalar_type())), p.scale);
    out.out_THC.narrow(0, begin, queries).copy_(o.squeeze(0).transpose(0, 1));
    out.lse_TH.narrow(0, begin, queries).copy_(l.squeeze(0).transpose(0, 1).reshape({queries, p.heads()}));
  });
  return out;
}

AttentionGradients attention_backward_aten(const AttentionProblem& p, const AttentionOutput& output,
                                           const at::Tensor& dout) {
  const int64_t groups = p.groups(), repeat = p.heads() / groups;
  AttentionGradients grads{at::empty(p.q_THC.sizes(), p.q_THC.options()), at::zeros(p.k_SGC.sizes(), p.k_SGC.options()),
                           at::zeros(p.v_SGC.sizes(), p.v_SGC.options())};
  run_tasks(p.num_sequences(), true, [&](int64_t i) {
    const int64_t begin = p.cu_q[i], queries = p.cu_q[i + 1] - begin, first = p.cu_kv[i], keys = p.cu_kv[i + 1] - first;
    if (queries == 0) return;
    const at::Tensor mask = window_mask(queries, keys, p.window, p.q_THC.device());
    const auto part = [&](const at::Tensor& x) { return heads_first(x.narrow(0, begin, queries), 1); };
    const auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        part(dout), part(p.q_THC), heads_first(p.k_SGC.narrow(0, first, keys), repeat),
        heads_first(p.v_SGC.narrow(0, first, keys), repeat), part(output.out_THC),
        output.lse_TH.narrow(0, begin, queries).transpose(0, 1).unsqueeze(0), 0.0, !mask.defined(),
        optional(additive(mask, p.q_THC.scalar_type())), p.scale);
    grads.q_THC.narrow(0, begin, queries).copy_(gq.squeeze(0).transpose(0, 1));
    const auto fold = [&](const at::Tensor& g) {
      return g.view({groups, repeat, keys, g.size(-1)}).sum(1).transpose(0, 1);
    };
    grads.k_SGC.narrow(0, first, keys).copy_(fold(gk));
    grads.v_SGC.narrow(0, first, keys).copy_(fold(gv));
  });
  return grads;
}

at::Tensor attention_differentiable_aten(const AttentionProblem& p) {
  const int64_t repeat = p.heads() / p.groups();
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < p.num_sequences(); ++i) {
    const int64_t begin = p.cu_q[i], queries = p.cu_q[i + 1] - begin, first = p.cu_kv[i], keys = p.cu_kv[i + 1] - first;
    const at::Tensor mask = window_mask(queries, keys, p.window, p.q_THC.device());
    const at::Tensor o = at::scaled_dot_product_attention(heads_first(p.q_THC.narrow(0, begin, queries), 1),
                                                          heads_first(p.k_SGC.narrow(0, first, keys), repeat),
                                                          heads_first(p.v_SGC.narrow(0, first, keys), repeat),
                                                          optional(mask), 0.0, !mask.defined() && queries > 1, p.scale);
    parts.push_back(o.squeeze(0).transpose(0, 1));
  }
  return at::cat(parts, 0);
}

at::Tensor attention_cached_aten(const CachedAttention& a) {
  const int64_t repeat = a.q_THC.size(1) / a.keys_BSGC.size(2);
  at::Tensor out = at::empty(a.q_THC.sizes(), a.q_THC.options());
  run_tasks(a.num_sequences(), a.q_THC.is_cpu(), [&](int64_t i) {
    const int64_t begin = a.cu_seqlens[i], queries = a.cu_seqlens[i + 1] - begin;
    if (queries == 0) return;
    // Keys that no query of this call can see need not be read.
    const int64_t first = a.window > 0 ? std::max<int64_t>(0, a.kv_lengths[i] - queries - a.window + 1) : 0,
                  keys = a.kv_lengths[i] - first;
    const at::Tensor mask = window_mask(queries, keys, a.window, a.q_THC.device());
    const at::Tensor o = at::scaled_dot_product_attention(heads_first(a.q_THC.narrow(0, begin, queries), 1),
                                                          heads_first(a.keys_BSGC[i].narrow(0, first, keys), repeat),
                                                          heads_first(a.values_BSGC[i].narrow(0, first, keys), repeat),
                                                          optional(mask), 0.0, !mask.defined() && queries > 1, a.scale);
    out.narrow(0, begin, queries).copy_(o.squeeze(0).transpose(0, 1));
  });
  return out;
}

at::Tensor attention_step_aten(const StepAttention& a) {
  const int64_t B = a.q_BHC.size(0), room = a.keys_BSGC.size(1), repeat = a.q_BHC.size(1) / a.keys_BSGC.size(2);
  const at::Tensor cell = at::arange(room, a.lengths_B.options()).unsqueeze(0), last = a.lengths_B.unsqueeze(1);
  at::Tensor seen_BS = cell <= last;
  if (a.window > 0) seen_BS = seen_BS & (cell > last - a.window);
  const auto heads = [&](const at::Tensor& cache) {
    return cache.narrow(0, 0, B).transpose(1, 2).repeat_interleave(repeat, 1);
  };  // [B, H, S, C]
  return at::scaled_dot_product_attention(a.q_BHC.unsqueeze(2), heads(a.keys_BSGC), heads(a.values_BSGC),
                                          seen_BS.view({B, 1, 1, room}), 0.0, false, a.scale)
      .squeeze(2);
}

}  // namespace moegraft::kernels
