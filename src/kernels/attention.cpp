// Attention over packed sequences and over a cache: picks the path.

#include "attention.h"

#include <limits>

#include "block_product.h"
#include "cpu.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor heads_first(const at::Tensor& x_SGC, int64_t repeat) {  // [S,G,C] -> [1,G*repeat,S,C]
  const at::Tensor x = x_SGC.transpose(0, 1).unsqueeze(0);
  if (repeat == 1) return x;
  const auto s = x.sizes();
  return x.unsqueeze(2).expand({1, s[1], repeat, s[2], s[3]}).reshape({1, s[1] * repeat, s[2], s[3]});
}

// True where query i (absolute position kv - queries + i) may see key j. Undefined when plain causal (or full) attention says the same.
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
  return at::zeros(mask.sizes(), mask.options().dtype(dtype)).masked_fill_(mask.logical_not(), -std::numeric_limits<double>::infinity()).unsqueeze(0).unsqueeze(0);
}

std::optional<at::Tensor> optional(const at::Tensor& x) { return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt; }

// One library call per sequence: CPUs without block products, and float64.
AttentionOutput forward_aten(const AttentionProblem& p) {
  const int64_t repeat = p.heads() / p.groups();
  AttentionOutput out{at::empty(p.q_THC.sizes(), p.q_THC.options()), at::empty({p.q_THC.size(0), p.heads()}, p.q_THC.options().dtype(at::kFloat))};
  run_tasks(p.num_sequences(), true, [&](int64_t i) {
    const int64_t begin = p.cu_q[i], queries = p.cu_q[i + 1] - begin, first = p.cu_kv[i], keys = p.cu_kv[i + 1] - first;
    if (queries == 0) return;
    const at::Tensor mask = window_mask(queries, keys, p.window, p.q_THC.device());
    const auto [o, l] = at::_scaled_dot_product_flash_attention_for_cpu(heads_first(p.q_THC.narrow(0, begin, queries), 1), heads_first(p.k_SGC.narrow(0, first, keys), repeat),
                                                                        heads_first(p.v_SGC.narrow(0, first, keys), repeat), 0.0, !mask.defined(),
                                                                        optional(additive(mask, p.q_THC.scalar_type())), p.scale);
    out.out_THC.narrow(0, begin, queries).copy_(o.squeeze(0).transpose(0, 1));
    out.lse_TH.narrow(0, begin, queries).copy_(l.squeeze(0).transpose(0, 1).reshape({queries, p.heads()}));
  });
  return out;
}

AttentionGradients backward_aten(const AttentionProblem& p, const AttentionOutput& output, const at::Tensor& dout) {
  const int64_t groups = p.groups(), repeat = p.heads() / groups;
  AttentionGradients grads{at::empty(p.q_THC.sizes(), p.q_THC.options()), at::zeros(p.k_SGC.sizes(), p.k_SGC.options()), at::zeros(p.v_SGC.sizes(), p.v_SGC.options())};
  run_tasks(p.num_sequences(), true, [&](int64_t i) {
    const int64_t begin = p.cu_q[i], queries = p.cu_q[i + 1] - begin, first = p.cu_kv[i], keys = p.cu_kv[i + 1] - first;
    if (queries == 0) return;
    const at::Tensor mask = window_mask(queries, keys, p.window, p.q_THC.device());
    const auto part = [&](const at::Tensor& x) { return heads_first(x.narrow(0, begin, queries), 1); };
    const auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        part(dout), part(p.q_THC), heads_first(p.k_SGC.narrow(0, first, keys), repeat), heads_first(p.v_SGC.narrow(0, first, keys), repeat), part(output.out_THC),
        output.lse_TH.narrow(0, begin, queries).transpose(0, 1).unsqueeze(0), 0.0, !mask.defined(), optional(additive(mask, p.q_THC.scalar_type())), p.scale);
    grads.q_THC.narrow(0, begin, queries).copy_(gq.squeeze(0).transpose(0, 1));
    const auto fold = [&](const at::Tensor& g) { return g.view({groups, repeat, keys, g.size(-1)}).sum(1).transpose(0, 1); };
    grads.k_SGC.narrow(0, first, keys).copy_(fold(gk));
    grads.v_SGC.narrow(0, first, keys).copy_(fold(gv));
  });
  return grads;
}

struct Node : torch::CustomClassHolder {
  AttentionProblem shape;  // without the tensors, which autograd keeps
};

class PackedAttention : public torch::autograd::Function<PackedAttention> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const c10::intrusive_ptr<Node>& node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    AttentionProblem p = node->shape;
    p.q_THC = q, p.k_SGC = k, p.v_SGC = v;
    const AttentionOutput out = attention_cuda_serves(q) ? attention_forward_cuda(p) : attention_blocks_serve(p) ? attention_forward_blocks(p) : forward_aten(p);
    variable_list saved{q, k, v, out.out_THC, out.lse_TH};
    saved.insert(saved.end(), out.extra.begin(), out.extra.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    return out.out_THC;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    AttentionProblem p = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule())->shape;
    p.q_THC = saved[0], p.k_SGC = saved[1], p.v_SGC = saved[2];
    const AttentionOutput out{saved[3], saved[4], {saved.begin() + 5, saved.end()}};
    const at::Tensor dout = grads[0].contiguous();
    const AttentionGradients g = attention_cuda_serves(p.q_THC) ? attention_backward_cuda(p, out, dout)
                                 : attention_blocks_serve(p)    ? attention_backward_blocks(p, out, dout)
                                                                : backward_aten(p, out, dout);
    return {g.q_THC, g.k_SGC, g.v_SGC, at::Tensor()};
  }
};

struct Join : torch::CustomClassHolder {
  std::vector<int64_t> past, now;
};

class JoinSequences : public torch::autograd::Function<JoinSequences> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& past, const at::Tensor& now, const c10::intrusive_ptr<Join>& cu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["cu"] = c10::IValue::make_capsule(cu);
    auto sizes = now.sizes().vec();
    sizes[0] = cu->past.back() + cu->now.back();
    at::Tensor out = at::empty(sizes, now.options());
    for (size_t i = 0; i + 1 < cu->past.size(); ++i) {
      const int64_t begin = cu->past[i] + cu->now[i], before = cu->past[i + 1] - cu->past[i], count = cu->now[i + 1] - cu->now[i];
      out.narrow(0, begin, before).copy_(past.narrow(0, cu->past[i], before));
      out.narrow(0, begin + before, count).copy_(now.narrow(0, cu->now[i], count));
    }
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto cu = c10::static_intrusive_pointer_cast<Join>(ctx->saved_data["cu"].toCapsule());
    auto sizes = grads[0].sizes().vec();
    sizes[0] = cu->now.back();
    at::Tensor dnow = at::empty(sizes, grads[0].options());
    for (size_t i = 0; i + 1 < cu->past.size(); ++i) {
      const int64_t count = cu->now[i + 1] - cu->now[i];
      dnow.narrow(0, cu->now[i], count).copy_(grads[0].narrow(0, cu->past[i + 1] + cu->now[i], count));
    }
    return {at::Tensor(), dnow, at::Tensor()};
  }
};

// One query for each of the first sequences of a cache, on the CPU: a library call per sequence costs more than the arithmetic. A task is a sequence's heads
// of one group; each head's scores, softmax and sum have one order.
template <class T>
at::Tensor decode_cpu(const at::Tensor& q_BHC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC, const std::vector<int64_t>& kv_lengths, int64_t window, double scale) {
  const at::Tensor in = q_BHC.contiguous();
  const int64_t B = in.size(0), H = in.size(1), C = in.size(2), room = keys_BSGC.size(1), G = keys_BSGC.size(2), repeat = H / G;
  at::Tensor out = at::empty(in.sizes(), in.options());
  at::parallel_for(0, B * G, 1, [&](int64_t from, int64_t end) {
    std::vector<float> scores, weights;
    for (int64_t task = from; task < end; ++task) {
      const int64_t b = task / G, g = task % G, first = window > 0 ? std::max<int64_t>(0, kv_lengths[size_t(b)] - window) : 0, count = kv_lengths[size_t(b)] - first;
      const int64_t begin = ((b * room + first) * G + g) * C;
      const T *keys = data<T>(keys_BSGC) + begin, *values = data<T>(values_BSGC) + begin;
      scores.resize(size_t(count)), weights.resize(size_t(count));
      for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) {
        const T* q = data<T>(in) + (b * H + h) * C;
        loops<T>().dots(q, keys, G * C, count, C, scores.data());
        float largest = -std::numeric_limits<float>::max();
        const float total = loops<float>().softmax(scores.data(), float(scale), 0, count, count, weights.data(), &largest);
        loops<float>().from_float(weights.data(), 1.0f / total, weights.data(), count);
        loops<T>().weighted_rows(weights.data(), values, G * C, count, mutable_data<T>(out) + (b * H + h) * C, C);
      }
    }
  });
  return out;
}

void check_shapes(const at::Tensor& q, int64_t groups, const std::vector<int64_t>& cu_seqlens) {
  MOEGRAFT_INVARIANT(q.dim() == 3 && q.size(1) % groups == 0, "attention: q ", q.sizes(), ", ", groups, " key/value heads");
  MOEGRAFT_INVARIANT(!cu_seqlens.empty() && cu_seqlens.front() == 0 && cu_seqlens.back() == q.size(0), "attention: cu_seqlens does not span the ", q.size(0), " tokens");
}

}  // namespace

at::Tensor packed_attention(const at::Tensor& q_THC, const at::Tensor& k_SGC, const at::Tensor& v_SGC, const std::vector<int64_t>& cu_q, const std::vector<int64_t>& cu_kv, int64_t window,
                            double scale, const DeviceLengths& on_device) {
  RECORD_FUNCTION("moegraft::packed_attention", {});
  check_shapes(q_THC, k_SGC.size(1), cu_q);
  for (const at::Tensor* cu : {&on_device.cu_q, &on_device.cu_kv})
    MOEGRAFT_INVARIANT(!cu->defined() || (cu->scalar_type() == at::kInt && cu->device() == q_THC.device() && cu->numel() == int64_t(cu_q.size())), "attention: lengths on the device: ",
                       cu->sizes(), " ", c10::toString(cu->scalar_type()), " on ", cu->device());
  MOEGRAFT_INVARIANT(cu_kv.size() == cu_q.size() && cu_kv.front() == 0 && cu_kv.back() == k_SGC.size(0), "attention: cu_kv does not span the ", k_SGC.size(0), " keys");
  if (q_THC.is_cpu() || attention_cuda_serves(q_THC)) {
    auto node = c10::make_intrusive<Node>();
    node->shape.cu_q = cu_q, node->shape.cu_kv = cu_kv, node->shape.window = window, node->shape.scale = scale, node->shape.on_device = on_device;
    return PackedAttention::apply(q_THC.contiguous(), k_SGC.contiguous(), v_SGC.contiguous(), node);
  }
  // Elsewhere the library's own differentiable attention, one call per sequence.
  const int64_t repeat = q_THC.size(1) / k_SGC.size(1);
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i + 1 < cu_q.size(); ++i) {
    const int64_t begin = cu_q[i], queries = cu_q[i + 1] - begin, first = cu_kv[i], keys = cu_kv[i + 1] - first;
    const at::Tensor mask = window_mask(queries, keys, window, q_THC.device());
    const at::Tensor o = at::scaled_dot_product_attention(heads_first(q_THC.narrow(0, begin, queries), 1), heads_first(k_SGC.narrow(0, first, keys), repeat),
                                                          heads_first(v_SGC.narrow(0, first, keys), repeat), optional(mask), 0.0, !mask.defined() && queries > 1, scale);
    parts.push_back(o.squeeze(0).transpose(0, 1));
  }
  return at::cat(parts, 0);
}

at::Tensor join_sequences(const at::Tensor& past, const at::Tensor& now, const std::vector<int64_t>& cu_past, const std::vector<int64_t>& cu_now) {
  MOEGRAFT_INVARIANT(cu_past.size() == cu_now.size() && cu_past.back() == past.size(0) && cu_now.back() == now.size(0), "join_sequences: ", past.sizes(), " and ", now.sizes());
  auto cu = c10::make_intrusive<Join>();
  cu->past = cu_past;
  cu->now = cu_now;
  return JoinSequences::apply(past.detach(), now, cu);
}

at::Tensor cached_attention(const at::Tensor& q_THC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC, const std::vector<int64_t>& cu_seqlens,
                            const std::vector<int64_t>& kv_lengths, int64_t window, double scale) {
  RECORD_FUNCTION("moegraft::cached_attention", {});
  check_shapes(q_THC, keys_BSGC.size(2), cu_seqlens);
  const int64_t sequences = int64_t(cu_seqlens.size()) - 1, repeat = q_THC.size(1) / keys_BSGC.size(2);
  MOEGRAFT_INVARIANT(int64_t(kv_lengths.size()) == sequences && keys_BSGC.size(0) >= sequences, "attention: cache does not fit the batch");
  if (attention_cuda_serves(q_THC)) return attention_cached_cuda(q_THC, keys_BSGC, values_BSGC, cu_seqlens, kv_lengths, window, scale);
  bool one_each = has_cpu_path(q_THC) && q_THC.size(0) == sequences && keys_BSGC.is_contiguous() && values_BSGC.is_contiguous();
  for (int64_t i = 0; i < sequences; ++i) one_each &= cu_seqlens[size_t(i)] == i;
  if (one_each) {
    const auto decode = q_THC.scalar_type() == at::kFloat ? decode_cpu<float> : decode_cpu<bf16>;
    return decode(q_THC, keys_BSGC, values_BSGC, kv_lengths, window, scale);
  }
  at::Tensor out = at::empty(q_THC.sizes(), q_THC.options());
  if (has_cpu_path(q_THC) && has_block_products(q_THC.scalar_type()) && keys_BSGC.is_contiguous() && values_BSGC.is_contiguous()) {
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t begin = cu_seqlens[i], queries = cu_seqlens[i + 1] - begin, keys = kv_lengths[i];
      if (queries == 0) continue;
      const AttentionProblem p{q_THC.narrow(0, begin, queries).contiguous(), keys_BSGC[i].narrow(0, 0, keys), values_BSGC[i].narrow(0, 0, keys), {0, queries}, {0, keys}, window, scale};
      out.narrow(0, begin, queries).copy_(attention_forward_blocks(p).out_THC);
    }
    return out;
  }
  run_tasks(sequences, q_THC.is_cpu(), [&](int64_t i) {
    const int64_t begin = cu_seqlens[i], queries = cu_seqlens[i + 1] - begin;
    if (queries == 0) return;
    // Keys that no query of this call can see need not be read.
    const int64_t first = window > 0 ? std::max<int64_t>(0, kv_lengths[i] - queries - window + 1) : 0, keys = kv_lengths[i] - first;
    const at::Tensor mask = window_mask(queries, keys, window, q_THC.device());
    const at::Tensor o =
        at::scaled_dot_product_attention(heads_first(q_THC.narrow(0, begin, queries), 1), heads_first(keys_BSGC[i].narrow(0, first, keys), repeat),
                                         heads_first(values_BSGC[i].narrow(0, first, keys), repeat), optional(mask), 0.0, !mask.defined() && queries > 1, scale);
    out.narrow(0, begin, queries).copy_(o.squeeze(0).transpose(0, 1));
  });
  return out;
}

at::Tensor step_attention(const at::Tensor& q_BHC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC, const at::Tensor& lengths_B, int64_t window, double scale) {
  RECORD_FUNCTION("moegraft::step_attention", {});
  const int64_t B = q_BHC.size(0), room = keys_BSGC.size(1), groups = keys_BSGC.size(2), repeat = q_BHC.size(1) / groups;
  MOEGRAFT_INVARIANT(q_BHC.dim() == 3 && q_BHC.size(1) % groups == 0 && keys_BSGC.size(0) >= B && lengths_B.sizes() == at::IntArrayRef({B}), "step attention: q ", q_BHC.sizes(), ", keys ",
                     keys_BSGC.sizes(), ", lengths ", lengths_B.sizes());
  if (attention_cuda_serves(q_BHC)) return attention_step_cuda(q_BHC, keys_BSGC, values_BSGC, lengths_B, window, scale);
  const at::Tensor cell = at::arange(room, lengths_B.options()).unsqueeze(0), last = lengths_B.unsqueeze(1);
  at::Tensor seen_BS = cell <= last;
  if (window > 0) seen_BS = seen_BS & (cell > last - window);
  const auto heads = [&](const at::Tensor& cache) { return cache.narrow(0, 0, B).transpose(1, 2).repeat_interleave(repeat, 1); };  // [B, H, S, C]
  return at::scaled_dot_product_attention(q_BHC.unsqueeze(2), heads(keys_BSGC), heads(values_BSGC), seen_BS.view({B, 1, 1, room}), 0.0, false, scale).squeeze(2);
}

}  // namespace moegraft::kernels
