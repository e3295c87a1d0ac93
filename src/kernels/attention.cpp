// Attention over packed sequences: one library flash call per sequence, sequences spread over the threads.

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

class PackedAttention : public torch::autograd::Function<PackedAttention> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& cu_seqlens, int64_t window, double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t sequences = int64_t(cu_seqlens.size()) - 1, heads = q.size(1), repeat = heads / k.size(1);
    at::Tensor out = at::empty({q.size(0), heads, q.size(2)}, q.options());
    at::Tensor lse = at::empty({q.size(0), heads}, q.options().dtype(at::kFloat));
    run_tasks(sequences, q.is_cpu(), [&](int64_t i) {
      const int64_t begin = cu_seqlens[i], length = cu_seqlens[i + 1] - begin;
      if (length == 0) return;
      const at::Tensor mask = window_mask(length, length, window, q.device());
      const auto [o, l] = at::_scaled_dot_product_flash_attention_for_cpu(heads_first(q.narrow(0, begin, length), 1), heads_first(k.narrow(0, begin, length), repeat),
                                                                          heads_first(v.narrow(0, begin, length), repeat), 0.0, !mask.defined(),
                                                                          optional(additive(mask, q.scalar_type())), scale);
      out.narrow(0, begin, length).copy_(o.squeeze(0).transpose(0, 1));
      lse.narrow(0, begin, length).copy_(l.squeeze(0).transpose(0, 1).reshape({length, heads}));
    });
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["cu_seqlens"] = cu_seqlens;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const auto cu_seqlens = ctx->saved_data["cu_seqlens"].toIntVector();
    const int64_t window = ctx->saved_data["window"].toInt();
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t sequences = int64_t(cu_seqlens.size()) - 1, heads = q.size(1), groups = k.size(1), repeat = heads / groups;
    at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
    const at::Tensor dout = grads[0].contiguous();
    run_tasks(sequences, q.is_cpu(), [&](int64_t i) {
      const int64_t begin = cu_seqlens[i], length = cu_seqlens[i + 1] - begin;
      if (length == 0) return;
      const at::Tensor mask = window_mask(length, length, window, q.device());
      const auto part = [&](const at::Tensor& x) { return x.narrow(0, begin, length); };
      const auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          heads_first(part(dout), 1), heads_first(part(q), 1), heads_first(part(k), repeat), heads_first(part(v), repeat), heads_first(part(out), 1),
          part(lse).transpose(0, 1).unsqueeze(0), 0.0, !mask.defined(), optional(additive(mask, q.scalar_type())), scale);
      part(dq).copy_(gq.squeeze(0).transpose(0, 1));
      const auto fold = [&](const at::Tensor& g) { return g.view({groups, repeat, length, g.size(-1)}).sum(1).transpose(0, 1); };
      part(dk).copy_(fold(gk));
      part(dv).copy_(fold(gv));
    });
    return {dq, dk, dv, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

void check_shapes(const at::Tensor& q, int64_t groups, const std::vector<int64_t>& cu_seqlens) {
  MOEGRAFT_INVARIANT(q.dim() == 3 && q.size(1) % groups == 0, "attention: q ", q.sizes(), ", ", groups, " key/value heads");
  MOEGRAFT_INVARIANT(!cu_seqlens.empty() && cu_seqlens.front() == 0 && cu_seqlens.back() == q.size(0), "attention: cu_seqlens does not span the ", q.size(0), " tokens");
}

}  // namespace

at::Tensor packed_attention(const at::Tensor& q_THC, const at::Tensor& k_TGC, const at::Tensor& v_TGC, const std::vector<int64_t>& cu_seqlens, int64_t window, double scale) {
  check_shapes(q_THC, k_TGC.size(1), cu_seqlens);
  if (q_THC.is_cpu()) return PackedAttention::apply(q_THC, k_TGC, v_TGC, cu_seqlens, window, scale);
  // Elsewhere the library's own differentiable attention, one call per sequence.
  const int64_t repeat = q_THC.size(1) / k_TGC.size(1);
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    const int64_t begin = cu_seqlens[i], length = cu_seqlens[i + 1] - begin;
    const at::Tensor mask = window_mask(length, length, window, q_THC.device());
    const at::Tensor o = at::scaled_dot_product_attention(heads_first(q_THC.narrow(0, begin, length), 1), heads_first(k_TGC.narrow(0, begin, length), repeat),
                                                          heads_first(v_TGC.narrow(0, begin, length), repeat), optional(mask), 0.0, !mask.defined(), scale);
    parts.push_back(o.squeeze(0).transpose(0, 1));
  }
  return at::cat(parts, 0);
}

at::Tensor cached_attention(const at::Tensor& q_THC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC, const std::vector<int64_t>& cu_seqlens,
                            const std::vector<int64_t>& kv_lengths, int64_t window, double scale) {
  check_shapes(q_THC, keys_BSGC.size(2), cu_seqlens);
  const int64_t sequences = int64_t(cu_seqlens.size()) - 1, repeat = q_THC.size(1) / keys_BSGC.size(2);
  MOEGRAFT_INVARIANT(int64_t(kv_lengths.size()) == sequences && keys_BSGC.size(0) >= sequences, "attention: cache does not fit the batch");
  at::Tensor out = at::empty(q_THC.sizes(), q_THC.options());
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

}  // namespace moegraft::kernels
