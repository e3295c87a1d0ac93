// Attention over packed sequences and over a cache: which implementation computes it, and its autograd function.

#include "attention.h"

#include "implementations.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct PackedImplementation {
  bool (*serves)(const AttentionProblem&);
  AttentionOutput (*forward)(const AttentionProblem&);
  AttentionGradients (*backward)(const AttentionProblem&, const AttentionOutput&, const at::Tensor& dout_THC);
};
constexpr PackedImplementation kPacked[]{
    {[](const AttentionProblem& p) { return attention_cuda_serves(p.q_THC); }, attention_forward_cuda,
     attention_backward_cuda},
    {attention_blocks_serve, attention_forward_blocks, attention_backward_blocks},
    {kAlways, attention_forward_aten, attention_backward_aten},
};

struct Node : torch::CustomClassHolder {
  AttentionProblem shape;  // without the tensors, which autograd keeps
};

class PackedAttention : public torch::autograd::Function<PackedAttention> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const c10::intrusive_ptr<Node>& node) {
    at::AutoDispatchBelowADInplaceOrView guard;
    AttentionProblem p = node->shape;
    p.q_THC = q, p.k_SGC = k, p.v_SGC = v;
    const AttentionOutput out = choose(kPacked, p).forward(p);
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
    const AttentionGradients g = choose(kPacked, p).backward(p, out, grads[0].contiguous());
    return {g.q_THC, g.k_SGC, g.v_SGC, at::Tensor()};
  }
};

at::Tensor with_own_backward(const AttentionProblem& p) {
  auto node = c10::make_intrusive<Node>();
  node->shape = p;
  node->shape.q_THC = node->shape.k_SGC = node->shape.v_SGC = at::Tensor();
  return PackedAttention::apply(p.q_THC.contiguous(), p.k_SGC.contiguous(), p.v_SGC.contiguous(), node);
}

struct PackedOperation {
  bool (*serves)(const AttentionProblem&);
  at::Tensor (*run)(const AttentionProblem&);
};
constexpr PackedOperation kPackedOperations[]{
    {[](const AttentionProblem& p) { return p.q_THC.is_cpu() || attention_cuda_serves(p.q_THC); }, with_own_backward},
    {kAlways, attention_differentiable_aten},
};

struct CachedImplementation {
  bool (*serves)(const CachedAttention&);
  at::Tensor (*run)(const CachedAttention&);
};
constexpr CachedImplementation kCached[]{
    {[](const CachedAttention& a) { return attention_cuda_serves(a.q_THC); },
     [](const CachedAttention& a) {
       return attention_cached_cuda(a.q_THC, a.keys_BSGC, a.values_BSGC, a.cu_seqlens, a.kv_lengths, a.window, a.scale);
     }},
    {attention_decode_serves, attention_decode},
    {attention_cached_blocks_serve, attention_cached_blocks},
    {kAlways, attention_cached_aten},
};

struct StepImplementation {
  bool (*serves)(const StepAttention&);
  at::Tensor (*run)(const StepAttention&);
};
constexpr StepImplementation kStep[]{
    {[](const StepAttention& a) { return attention_cuda_serves(a.q_BHC); },
     [](const StepAttention& a) {
       return attention_step_cuda(a.q_BHC, a.keys_BSGC, a.values_BSGC, a.lengths_B, a.window, a.scale);
     }},
    {kAlways, attention_step_aten},
};

struct Join : torch::CustomClassHolder {
  std::vector<int64_t> past, now;
};

class JoinSequences : public torch::autograd::Function<JoinSequences> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& past, const at::Tensor& now,
                            const c10::intrusive_ptr<Join>& cu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["cu"] = c10::IValue::make_capsule(cu);
    auto sizes = now.sizes().vec();
    sizes[0] = cu->past.back() + cu->now.back();
    at::Tensor out = at::empty(sizes, now.options());
    for (size_t i = 0; i + 1 < cu->past.size(); ++i) {
      const int64_t begin = cu->past[i] + cu->now[i], before = cu->past[i + 1] - cu->past[i],
                    count = cu->now[i + 1] - cu->now[i];
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

void check_shapes(const at::Tensor& q, int64_t groups, const std::vector<int64_t>& cu_seqlens) {
  MOEGRAFT_INVARIANT(q.dim() == 3 && q.size(1) % groups == 0, "attention: q ", q.sizes(), ", ", groups,
                     " key/value heads");
  MOEGRAFT_INVARIANT(!cu_seqlens.empty() && cu_seqlens.front() == 0 && cu_seqlens.back() == q.size(0),
                     "attention: cu_seqlens does not span the ", q.size(0), " tokens");
}

}  // namespace

at::Tensor packed_attention(const at::Tensor& q_THC, const at::Tensor& k_SGC, const at::Tensor& v_SGC,
                            const std::vector<int64_t>& cu_q, const std::vector<int64_t>& cu_kv, int64_t window,
                            double scale, const DeviceLengths& on_device) {
  RECORD_FUNCTION("moegraft::packed_attention", {});
  check_shapes(q_THC, k_SGC.size(1), cu_q);
  for (const at::Tensor* cu : {&on_device.cu_q, &on_device.cu_kv})
    MOEGRAFT_INVARIANT(
        !cu->defined() ||
            (cu->scalar_type() == at::kInt && cu->device() == q_THC.device() && cu->numel() == int64_t(cu_q.size())),
        "attention: lengths on the device: ", cu->sizes(), " ", c10::toString(cu->scalar_type()), " on ", cu->device());
  MOEGRAFT_INVARIANT(cu_kv.size() == cu_q.size() && cu_kv.front() == 0 && cu_kv.back() == k_SGC.size(0),
                     "attention: cu_kv does not span the ", k_SGC.size(0), " keys");
  const AttentionProblem p{q_THC, k_SGC, v_SGC, cu_q, cu_kv, window, scale, on_device};
  return choose(kPackedOperations, p).run(p);
}

at::Tensor join_sequences(const at::Tensor& past, const at::Tensor& now, const std::vector<int64_t>& cu_past,
                          const std::vector<int64_t>& cu_now) {
  MOEGRAFT_INVARIANT(cu_past.size() == cu_now.size() && cu_past.back() == past.size(0) && cu_now.back() == now.size(0),
                     "join_sequences: ", past.sizes(), " and ", now.sizes());
  auto cu = c10::make_intrusive<Join>();
  cu->past = cu_past;
  cu->now = cu_now;
  return JoinSequences::apply(past.detach(), now, cu);
}

at::Tensor cached_attention(const at::Tensor& q_THC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC,
                            const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& kv_lengths,
                            int64_t window, double scale) {
  RECORD_FUNCTION("moegraft::cached_attention", {});
  check_shapes(q_THC, keys_BSGC.size(2), cu_seqlens);
  const CachedAttention a{q_THC, keys_BSGC, values_BSGC, cu_seqlens, kv_lengths, window, scale};
  MOEGRAFT_INVARIANT(int64_t(kv_lengths.size()) == a.num_sequences() && keys_BSGC.size(0) >= a.num_sequences(),
                     "attention: cache does not fit the batch");
  return choose(kCached, a).run(a);
}

at::Tensor step_attention(const at::Tensor& q_BHC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC,
                          const at::Tensor& lengths_B, int64_t window, double scale) {
  RECORD_FUNCTION("moegraft::step_attention", {});
  const int64_t B = q_BHC.size(0), groups = keys_BSGC.size(2);
  MOEGRAFT_INVARIANT(q_BHC.dim() == 3 && q_BHC.size(1) % groups == 0 && keys_BSGC.size(0) >= B &&
                         lengths_B.sizes() == at::IntArrayRef({B}),
                     "step attention: q ", q_BHC.sizes(), ", keys ", keys_BSGC.sizes(), ", lengths ",
                     lengths_B.sizes());
  const StepAttention a{q_BHC, keys_BSGC, values_BSGC, lengths_B, window, scale};
  return choose(kStep, a).run(a);
}

}  // namespace moegraft::kernels
