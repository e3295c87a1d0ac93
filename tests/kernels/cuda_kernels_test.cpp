// The device kernels on a GPU: against the same functors on the host and against plain ATen in double, twice for equal
// bits, and without waiting for the device. Everything here needs a GPU and skips without one; it has not run on one
// yet. bf16 is bounded by what plain bf16 ATen makes of the same inputs.
#include <functional>

#include "../support/gpu.h"
#include "cuda_cases.h"
#include "kernels/attention.h"

#ifdef MOEGRAFT_HAVE_CUDA
#include <c10/cuda/CUDAFunctions.h>

#include "kernels/cuda/attention_choice.h"
#include "kernels/cuda/cudnn_attention.h"
#include "kernels/cuda/device_run.h"
#endif

namespace moegraft::kernels::cuda {
namespace {

at::Tensor gpu(const at::Tensor& x) { return x.defined() ? x.to(at::Device(at::kCUDA, 0)) : x; }
at::Tensor cpu(const at::Tensor& x) { return x.to(at::kCPU); }
bool same(const at::Tensor& device, const at::Tensor& host) { return at::equal(cpu(device), host); }

// While it lives, a library call that waits for the device throws (in a build without CUDA there is none).
class [[maybe_unused]] NoWaiting {
 public:
#ifdef MOEGRAFT_HAVE_CUDA
  NoWaiting() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR); }
  ~NoWaiting() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED); }
#endif
};

TEST(CudaKernels, DispatchEqualsTheHosts) {
  MOEGRAFT_NEEDS_GPU();
  std::vector<Routing> cases = kRoutings;
  cases.push_back({4096, 128, 8, 2, 0});
  for (const auto& c : cases) {
    const auto [ids, group] = make_routing(c);
    const Dispatch host = Host::make_dispatch(ids, c.E, group, c.groups, rows_of(ids));
    const at::Tensor ids_d = gpu(ids), group_d = gpu(group);
    const Dispatch d = [&] {
      const NoWaiting guard;
      return cuda::make_dispatch(ids_d, c.E, group_d, c.groups, host.num_rows());
    }();
    EXPECT_TRUE(same(d.token_of_row_R, host.token_of_row_R) && same(d.row_of_slot_TK, host.row_of_slot_TK) &&
                same(d.offsets, host.offsets))
        << c.T;
    for (const auto dtype : {at::kFloat, at::kBFloat16})
      for (const int64_t D : {5, 64}) {
        const at::Tensor x = randn({c.T, D}, 1, dtype), w = randn({c.T, c.K}, 2);
        const at::Tensor rows = cuda::gather_rows(gpu(x), d.token_of_row_R);
        EXPECT_TRUE(same(rows, x.index_select(0, host.token_of_row_R)));
        const at::Tensor picked = x.to(at::kDouble).unsqueeze(1) * (w.to(at::kDouble) * ids.ge(0)).unsqueeze(-1);
        EXPECT_LT(distance(cpu(cuda::combine(rows, gpu(w), d.row_of_slot_TK)), picked.sum(1)),
                  (dtype == at::kFloat ? 1e-5 : 2e-2) * (1 + largest(picked)));
      }
  }
}

TEST(CudaKernels, RouteEqualsTheHosts) {
  MOEGRAFT_NEEDS_GPU();
  for (const auto& [T, E, K] :
       std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {3, 5, 5}, {20, 33, 4}, {4097, 128, 8}, {5, 512, 16}})
    for (const bool renormalise : {false, true}) {
      const at::Tensor logits = randn({T, E}, 1) * 3, dw = randn({T, K}, 2), dp = randn({T, E}, 3);
      at::Tensor exact = wide(logits);
      const at::Tensor probs = at::softmax(exact, -1);
      const at::Tensor logits_d = gpu(logits), dw_d = gpu(dw), dp_d = gpu(dp);
      Route r;
      at::Tensor dlogits;
      {
        const NoWaiting guard;
        r = cuda::route_forward(logits_d, K, renormalise);
        dlogits = cuda::route_backward(r, dw_d, dp_d, renormalise);
      }
      const Route host = Host::route_forward(logits, K, renormalise);
      EXPECT_LT(distance(cpu(r.probs_TE), probs), 1e-6);
      EXPECT_LT(distance(cpu(r.topk_weights_TK), host.topk_weights_TK), 2e-6);
      EXPECT_GT((cpu(r.topk_ids_TK) == host.topk_ids_TK).to(at::kFloat).mean().item<double>(),
                0.999);  // exp's last bit may swap near ties
      EXPECT_LT(
          distance(cpu(dlogits), Host::route_backward({cpu(r.probs_TE), cpu(r.topk_ids_TK), cpu(r.topk_weights_TK)}, dw,
                                                      dp, renormalise)),
          1e-5 * (1 + largest(dp)));
    }
}

TEST(CudaKernels, RmsNormAndRotary) {
  MOEGRAFT_NEEDS_GPU();
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1}, {5, 7}, {133, 192}, {4096, 2048}, {0, 8}})
    for (const bool residual : {false, true})
      for (const auto& [from, to] : std::vector<std::pair<at::ScalarType, at::ScalarType>>{
               {at::kFloat, at::kFloat}, {at::kFloat, at::kBFloat16}, {at::kBFloat16, at::kBFloat16}}) {
        const at::Tensor x = randn(shape, 1, from), delta = residual ? randn(shape, 4, to) : at::Tensor(),
                         w = randn({shape.back()}, 2, from), d = randn(shape, 3, to), ds = randn(shape, 6, from);
        const Norm host = Host::rms_norm_forward(x, delta, w, 1e-5, to, true),
                   n = cuda::rms_norm_forward(gpu(x), gpu(delta), gpu(w), 1e-5, to, true);
        const double scale = 1 + largest(host.y.to(at::kDouble));
        EXPECT_LT(distance(cpu(n.y), host.y),
                  (to == at::kFloat ? 2e-6 : 1e-2) * scale);  // rstd's last bit may tip a bf16 rounding
        EXPECT_LT(distance(cpu(n.y_wide), host.y_wide), (from == at::kFloat ? 2e-6 : 1e-2) * scale);
        EXPECT_TRUE(same(n.sum, host.sum));
        const NormGradients a = Host::rms_norm_backward(d, {}, ds, host.sum, w, host.rstd, true),
                            b = cuda::rms_norm_backward(gpu(d), {}, gpu(ds), gpu(host.sum), gpu(w), gpu(host.rstd),
                                                        true),
                            c = cuda::rms_norm_backward(gpu(d), {}, gpu(ds), gpu(host.sum), gpu(w), gpu(host.rstd),
                                                        true);
        EXPECT_LT(distance(cpu(b.dx), a.dx), (from == at::kFloat ? 1e-5 : 2e-2) * (1 + largest(a.dx.to(at::kDouble))));
        EXPECT_LT(distance(cpu(b.dw), a.dw), (from == at::kFloat ? 1e-5 : 2e-2) * (1 + largest(a.dw.to(at::kDouble))));
        EXPECT_TRUE(at::equal(b.dx, c.dx) && at::equal(b.dw, c.dw));
      }
  for (const int64_t C : {2, 6, 128})
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor joint = randn({9, 6, C}, 4, dtype), x = joint.narrow(1, 3, 3), angle = randn({9, C / 2}, 5);
      const at::Tensor host = Host::rotary(x, angle.cos(), angle.sin(), -1),
                       y = cuda::rotary(gpu(joint).narrow(1, 3, 3), gpu(angle.cos()), gpu(angle.sin()), -1);
      EXPECT_LT(distance(cpu(y), host), dtype == at::kFloat ? 2e-6 : 2e-2);
    }
}

TEST(CudaKernels, SwigluAndCrossEntropy) {
  MOEGRAFT_NEEDS_GPU();
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1}, {5, 13}, {999, 768}, {0, 8}}) {
    const at::Tensor g = randn(shape, 1) * 3, u = randn(shape, 2), d = randn(shape, 3);
    EXPECT_LT(distance(cpu(cuda::swiglu_forward(gpu(g), gpu(u))), Host::swiglu_forward(g, u)), 1e-5);
    const auto host = Host::swiglu_backward(d, g, u), device = cuda::swiglu_backward(gpu(d), gpu(g), gpu(u));
    EXPECT_LT(distance(cpu(device.first), host.first), 1e-4);
    EXPECT_LT(distance(cpu(device.second), host.second), 1e-4);
  }
  for (const int64_t V : {1, 5, 512, 5003, 151936}) {
    const at::Tensor logits = randn({7, V}, 1) * 4, targets = at::arange(7) * 13 % V;
    at::Tensor exact = wide(logits);
    const at::Tensor nll = at::cross_entropy_loss(exact, targets, {}, at::Reduction::None);
    const at::Tensor grad = torch::autograd::grad({nll.sum() * 0.25}, {exact})[0];
    const at::Tensor inplace = gpu(logits), low = at::empty_like(inplace, inplace.options().dtype(at::kBFloat16));
    EXPECT_LT(distance(cpu(cuda::cross_entropy_rows(inplace, gpu(targets), 0.25, low)), nll), 1e-4);
    EXPECT_LT(distance(cpu(cuda::cross_entropy_rows(inplace, gpu(targets), 0.25, inplace)), nll), 1e-4);
    EXPECT_LT(distance(cpu(inplace), grad), 1e-5);
    EXPECT_LT(distance(cpu(low), grad), 2e-3);
  }
}

// ------------------------------------------------------------------------------------------------ experts

MoeInputs on_gpu(MoeInputs in) {
  MoeProblem& p = in.problem;
  p.x_XD = gpu(p.x_XD);
  p.weights_XK = gpu(p.weights_XK);
  p.dispatch.token_of_row_R = gpu(p.dispatch.token_of_row_R);
  p.dispatch.row_of_slot_TK = gpu(p.dispatch.row_of_slot_TK);
  p.dispatch.offsets = gpu(p.dispatch.offsets);
  // One matrix of each kind per storage, as a loader would lay them out.
  const auto place = [](ExpertMatrices& matrices) { matrices = gpu(at::stack(matrices.list())).unbind(0); };
  place(p.weights.gate_FD);
  place(p.weights.up_FD);
  place(p.weights.down_DF);
  for (auto& site : p.terms)
    for (ExpertLowRank& term : site) term.A_EPX = gpu(term.A_EPX), term.B_EXP = gpu(term.B_EXP);
  return in;
}

TEST(CudaKernels, ExpertsInBfloat16AreNoWorseThanPlain) {
  MOEGRAFT_NEEDS_GPU();
  std::vector<MoeCase> cases = kMoeCases;
  cases.push_back({{1000, 16, 4, 2, 2}, 256, 192, 16});
  for (const auto& c : cases) {
    const MoeInputs b = on_gpu(make_moe(c, at::kBFloat16, at::kFloat, Layout::stacked)),
                    d = make_moe(c, at::kDouble, at::kDouble, Layout::stacked),
                    p = make_moe(c, at::kBFloat16, at::kBFloat16, Layout::stacked);
    if (!moe_cuda_serves(b.problem))
      GTEST_SKIP() << "this GPU has no grouped product in one kernel (Hopper, Blackwell): the experts run through ATen";
    const at::Tensor dout = randn({c.routing.T, c.D}, 30).to(at::kBFloat16), dout_d = gpu(dout);
    at::Tensor exact, plain;
    const auto expected = exact_gradients(d, dout, exact), plain_grads = exact_gradients(p, dout, plain);
    const auto run = [&] {
      const NoWaiting guard;
      const MoeForward y = moe_forward_cuda(b.problem, true, false);
      std::vector<at::Tensor> out{y.out_XD};
      for (const auto& g : flat(moe_backward_cuda(b.problem, y.saved, dout_d, all_needs(b.problem)))) out.push_back(g);
      return out;
    };
    const auto once = run(), again = run();
    EXPECT_LE(distance(cpu(once[0]), exact), 2 * distance(plain, exact) + 1e-2 * (1 + largest(exact)))
        << "T " << c.routing.T;
    for (size_t i = 0; i < expected.size(); ++i) {
      const at::Tensor e = expected[i].defined() ? expected[i] : at::zeros_like(d.leaves[i]);
      // The floor is for cases of one token, where the plain path's error is a single sample: x, g, u, h, dh and the
      // products between are each rounded to 2^-9, and <h, dh> adds terms larger than itself.
      const double floor = 2e-2 * (1 + largest(e)),
                   plain_error = plain_grads[i].defined() ? distance(plain_grads[i], e) : 0;
      EXPECT_LE(distance(cpu(once[i + 1]), e), 2 * plain_error + floor) << "leaf " << i << ", T " << c.routing.T;
    }
    for (size_t i = 0; i < once.size(); ++i) EXPECT_TRUE(at::equal(once[i], again[i])) << "result " << i;
  }
}

TEST(CudaKernels, TextRowsKeepTheBaseBitsAndAnIdleExpertGetsZero) {
  MOEGRAFT_NEEDS_GPU();
  const MoeCase c{{120, 4, 2, 2, 2}, 64, 32, 8};  // expert 3 is never selected
  MoeInputs in = on_gpu(make_moe(c, at::kBFloat16, at::kFloat, Layout::stacked));
  if (!moe_cuda_serves(in.problem)) GTEST_SKIP() << "this GPU has no grouped product in one kernel";
  in.problem.terms[kUp].pop_back();  // the one that acts everywhere
  MoeInputs base = in;
  base.problem.terms = {};
  const at::Tensor text = make_routing(c.routing).second == 0;
  const MoeForward y = moe_forward_cuda(in.problem, true, false);
  const at::Tensor a = cpu(y.out_XD), b = cpu(moe_forward_cuda(base.problem, true, false).out_XD);
  EXPECT_TRUE(at::equal(a.index({text}), b.index({text})));
  EXPECT_FALSE(at::equal(a, b));
  const MoeGradients g = moe_backward_cuda(in.problem, y.saved, at::ones_like(in.problem.x_XD), all_needs(in.problem));
  for (const auto& site : g.factors)
    for (const auto& [A, B] : site) {
      EXPECT_EQ(largest(cpu(A[3])), 0.0);
      EXPECT_EQ(largest(cpu(B[3])), 0.0);
    }
}

TEST(CudaKernels, RoutingSumsAndAddedRowsEqualTheHosts) {
  MOEGRAFT_NEEDS_GPU();
  for (const auto& [T, E, K, M] : {std::tuple(1, 4, 2, 1), std::tuple(33, 7, 1, 2), std::tuple(700, 128, 8, 2)}) {
    const Route r = Host::route_forward(randn({T, E}, 11) * 2, K, true);
    const at::Tensor modality = at::arange(T, at::kLong) % M, host = at::zeros({M, 2 * E + 3}, at::kDouble);
    const auto sums = [&] {
      const at::Tensor to = gpu(at::zeros_like(host)), probs = gpu(r.probs_TE), ids = gpu(r.topk_ids_TK),
                       of = gpu(modality);
      const NoWaiting guard;
      kernels::add_routing_sums(to, probs, ids, of);
      return to;
    };
    Host::add_routing_sums(host, r.probs_TE, r.topk_ids_TK, modality);
    const at::Tensor once = sums();
    EXPECT_LT(distance(cpu(once), host), 1e-4) << "logarithms of two libraries";
    EXPECT_TRUE(at::equal(once, sums()));
  }
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor from = randn({400, 64}, 3, dtype), rows = at::arange(400) * 2 + 1, to = randn({801, 64}, 4, dtype),
                     on_device = gpu(to);
    add_rows(gpu(from), gpu(rows), on_device, 2.0);  // times a power of two: a fused multiplication rounds nothing else
    Host::add_rows(from, rows, to, 2.0);
    EXPECT_TRUE(same(on_device, to));
  }
}

// ------------------------------------------------------------------------------------------------ as the decoder calls
// them

TEST(CudaKernels, PublicOperationsEqualTheCpus) {
  MOEGRAFT_NEEDS_GPU();
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    compare_public_ops(public_ops(gpu(at::empty({0})).device(), dtype), public_ops(at::kCPU, dtype), dtype);
}

// ------------------------------------------------------------------------------------------------ attention

at::Tensor plain_attention(const AttentionProblem& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  std::vector<at::Tensor> out;
  const int64_t repeat = p.heads() / p.groups();
  for (int64_t s = 0; s < p.num_sequences(); ++s) {
    const int64_t queries = p.cu_q[s + 1] - p.cu_q[s], keys = p.cu_kv[s + 1] - p.cu_kv[s];
    const at::Tensor qs = q.narrow(0, p.cu_q[s], queries).transpose(0, 1);
    const auto spread = [&](const at::Tensor& x) {
      return x.narrow(0, p.cu_kv[s], keys).repeat_interleave(repeat, 1).transpose(0, 1);
    };
    const at::Tensor i = at::arange(keys - queries, keys).unsqueeze(1), j = at::arange(keys).unsqueeze(0);
    at::Tensor hidden = j > i;
    if (p.window > 0) hidden = hidden | (j <= i - p.window);
    out.push_back(
        at::matmul(
            at::softmax((at::matmul(qs, spread(k).transpose(1, 2)) * p.scale).masked_fill(hidden, -INFINITY), -1),
            spread(v))
            .transpose(0, 1));
  }
  return at::cat(out, 0);
}

struct AttentionCase {
  std::vector<int64_t> cu_q, cu_kv;
  int64_t H, G, C, window;
};
const std::vector<AttentionCase> kAttentionCases{{{0, 1}, {0, 1}, 1, 1, 8, 0},
                                                 {{0, 1, 1, 2}, {0, 1, 1, 2}, 4, 2, 16, 0},  // one query each, or none
                                                 {{0, 5, 5, 18, 19}, {0, 5, 5, 18, 19}, 6, 2, 16, 0},
                                                 {{0, 40, 45}, {0, 40, 45}, 4, 4, 64, 7},
                                                 {{0, 300, 1000}, {0, 300, 1000}, 8, 1, 128, 0},
                                                 {{0, 10, 14}, {0, 25, 60}, 4, 2, 32, 0},  // after a prefix
                                                 {{0, 10, 14}, {0, 25, 60}, 4, 2, 32, 5}};

// serves: of a problem on the GPU. Twice, for equal bits.
void check_attention(const std::function<bool(const AttentionProblem&)>& serves,
                     const std::function<AttentionOutput(const AttentionProblem&)>& forward,
                     const std::function<AttentionGradients(const AttentionProblem&, const AttentionOutput&,
                                                            const at::Tensor&)>& backward) {
  int served = 0;
  for (const auto& c : kAttentionCases) {
    AttentionProblem p{randn({c.cu_q.back(), c.H, c.C}, 1).to(at::kBFloat16),
                       randn({c.cu_kv.back(), c.G, c.C}, 2).to(at::kBFloat16),
                       randn({c.cu_kv.back(), c.G, c.C}, 3).to(at::kBFloat16),
                       c.cu_q,
                       c.cu_kv,
                       c.window,
                       0.3};
    std::vector<at::Tensor> exact{wide(p.q_THC), wide(p.k_SGC), wide(p.v_SGC)};
    const at::Tensor dout = randn(p.q_THC.sizes(), 4).to(at::kBFloat16),
                     z = plain_attention(p, exact[0], exact[1], exact[2]);
    const auto expected = torch::autograd::grad({z}, exact, {dout.to(at::kDouble)});
    AttentionProblem d = p;
    d.q_THC = gpu(p.q_THC), d.k_SGC = gpu(p.k_SGC), d.v_SGC = gpu(p.v_SGC);
    const auto lengths = [](const std::vector<int64_t>& cu) {
      return gpu(at::tensor(at::ArrayRef<int64_t>(cu), at::kInt));
    };
    for (const bool given : {false, true}) {  // the lengths, on the device
      if (given) d.on_device = {lengths(c.cu_q), lengths(c.cu_kv)};
      if (!serves(d)) continue;
      ++served;
      const at::Tensor dout_d = gpu(dout);
      const auto run = [&] {
        const NoWaiting guard;
        const AttentionOutput out = forward(d);
        const AttentionGradients g = backward(d, out, dout_d);
        return std::vector<at::Tensor>{out.out_THC, g.q_THC, g.k_SGC, g.v_SGC};
      };
      const auto once = run(), again = run();
      EXPECT_LT(distance(cpu(once[0]), z), 1e-2 * (1 + largest(z)));
      for (int i = 0; i < 3; ++i)
        EXPECT_LT(distance(cpu(once[i + 1]), expected[i]), 2e-2 * (1 + largest(expected[i])))
            << "input " << i << ", window " << c.window;
      for (size_t i = 0; i < once.size(); ++i) EXPECT_TRUE(at::equal(once[i], again[i])) << "result " << i;
      EXPECT_FALSE(at::globalContext().deterministicAlgorithms());
    }
  }
  if (served == 0) GTEST_SKIP() << "this GPU or build has no such attention";
}

TEST(CudaKernels, FlashAttentionWithGradients) {
  MOEGRAFT_NEEDS_GPU();
  check_attention([](const AttentionProblem& p) { return attention_cuda_serves(p.q_THC); }, attention_forward_cuda,
                  attention_backward_cuda);
}

#ifdef MOEGRAFT_HAVE_CUDA
TEST(CudaKernels, CudnnAttentionWithGradients) {
  MOEGRAFT_NEEDS_GPU();
  const auto serves = [](const AttentionProblem& p) {
    AttentionShape shape = attention_shape(p);
    shape.generation = device_generation(0);
    shape.cudnn_version = cudnn_attention_version();
    return choose_attention(shape, "cudnn").kernel == DeviceAttention::cudnn;
  };
  const auto forward = [](const AttentionProblem& p) {
    if (p.on_device.cu_q.defined()) return attention_forward_cudnn(p, p.on_device);
    const auto copied = [](const std::vector<int64_t>& cu) {
      return at::tensor(at::ArrayRef<int64_t>(cu), at::kInt).pin_memory().to(at::kCUDA, /*non_blocking=*/true);
    };
    return attention_forward_cudnn(p, {copied(p.cu_q), copied(p.cu_kv)});
  };
  check_attention(serves, forward, attention_backward_cudnn);
}
#endif

TEST(CudaKernels, CachedAttentionContinuesWhatPackedComputes) {
  MOEGRAFT_NEEDS_GPU();
  for (const int64_t window : {0, 4})
    for (const auto& past :
         std::vector<std::vector<int64_t>>{{7, 0}, {10, 5}, {11, 5}}) {  // several queries, one each, none and one
      const std::vector<int64_t> lengths{11, 6};
      AttentionProblem p{randn({17, 4, 16}, 1).to(at::kBFloat16),
                         randn({17, 2, 16}, 2).to(at::kBFloat16),
                         randn({17, 2, 16}, 3).to(at::kBFloat16),
                         {0, 11, 17},
                         {0, 11, 17},
                         window,
                         0.5};
      const at::Tensor whole =
          plain_attention(p, p.q_THC.to(at::kDouble), p.k_SGC.to(at::kDouble), p.v_SGC.to(at::kDouble));
      at::Tensor keys = at::full({3, 16, 2, 16}, NAN).to(at::kBFloat16),
                 values = keys.clone();  // what lies beyond a length, and a third sequence, must not count
      keys[0].narrow(0, 0, 11).copy_(p.k_SGC.narrow(0, 0, 11));
      values[0].narrow(0, 0, 11).copy_(p.v_SGC.narrow(0, 0, 11));
      keys[1].narrow(0, 0, 6).copy_(p.k_SGC.narrow(0, 11, 6));
      values[1].narrow(0, 0, 6).copy_(p.v_SGC.narrow(0, 11, 6));
      const auto rest = [&](const at::Tensor& x) {
        return at::cat({x.narrow(0, past[0], 11 - past[0]), x.narrow(0, 11 + past[1], 6 - past[1])}, 0);
      };
      const at::Tensor q = gpu(rest(p.q_THC));
      if (!attention_cuda_serves(q)) GTEST_SKIP() << "this GPU is older than Ampere";
      const at::Tensor y = attention_cached_cuda(q, gpu(keys), gpu(values), {0, 11 - past[0], 17 - past[0] - past[1]},
                                                 lengths, window, 0.5);
      EXPECT_LT(distance(cpu(y), rest(whole)), 1e-2 * (1 + largest(whole)));
    }
}

}  // namespace
}  // namespace moegraft::kernels::cuda
