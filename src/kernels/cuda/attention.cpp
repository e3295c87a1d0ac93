// Attention over packed sequences and over a cache by the library's flash kernels, or cuDNN's for packed sequences
// where choose_attention says so (attention_stub.cpp where CUDA is off). Grouped queries and sequences of any lengths
// in one launch. Not at::_cudnn_attention_*, whose kernels are faster: in LibTorch 2.11 its packed backward takes the
// head's width for the longest sequence's length and reads out of bounds beyond it (pytorch#186142, mended later); nor
// does it ask for a deterministic backward, and it plans anew for every shape.

#ifdef MOEGRAFT_HAVE_CUDA

#include "../attention.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>

#include "attention_choice.h"
#include "cudnn_attention.h"
#include "device_run.h"

namespace moegraft::kernels {
namespace {

// The flash backward asks the process-wide switch whether float atomics may be used, and offers no argument for it (the
// function below the operator, which has one, is not exported by torch 2.11). Set for one call and put back, although
// an operation without a deterministic form would throw if another thread ran it meanwhile (no thread of ours computes
// during a backward pass). Setting it for good would cost more than that: every cuBLAS product then throws unless
// CUBLAS_WORKSPACE_CONFIG was in the environment before the start, and index_add, index_copy and index_select's
// gradient sort their indices first, which occur once each here and so have one order without. The switch's other
// effect, filling every fresh tensor, is kept off.
class DeterministicAlgorithms {
 public:
  DeterministicAlgorithms() {
    at::globalContext().setDeterministicAlgorithms(true, false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }
  ~DeterministicAlgorithms() {
    at::globalContext().setDeterministicAlgorithms(on_, warn_only_);
    at::globalContext().setDeterministicFillUninitializedMemory(fill_);
  }
  DeterministicAlgorithms(const DeterministicAlgorithms&) = delete;
  DeterministicAlgorithms& operator=(const DeterministicAlgorithms&) = delete;

 private:
  const bool on_ = at::globalContext().deterministicAlgorithms(),
             warn_only_ = at::globalContext().deterministicAlgorithmsWarnOnly(),
             fill_ = at::globalContext().deterministicFillUninitializedMemory();
};

// The library's window counts the keys to the left beside the query's own.
std::optional<int64_t> left(int64_t window) { return window > 0 ? std::optional<int64_t>(window - 1) : std::nullopt; }
std::optional<int64_t> right(int64_t window) { return window > 0 ? std::optional<int64_t>(0) : std::nullopt; }

// Through pinned memory, so that the copy is queued and not awaited; the pinned block is kept until then (its allocator
// records the stream).
at::Tensor to_device(const std::vector<int64_t>& values, const at::Device& device) {
  const at::Tensor host = at::empty({int64_t(values.size())}, at::TensorOptions(at::kInt).pinned_memory(true));
  std::copy(values.begin(), values.end(), host.data_ptr<int32_t>());
  return host.to(device, /*non_blocking=*/true);
}

// Cumulative lengths beside the tensors, copied where the caller has none there.
DeviceLengths lengths_of(const AttentionProblem& p) {
  const at::Device device = p.q_THC.device();
  const at::Tensor cu_q = p.on_device.cu_q.defined() ? p.on_device.cu_q : to_device(p.cu_q, device);
  return {cu_q, p.on_device.cu_kv.defined() ? p.on_device.cu_kv
                : p.cu_kv == p.cu_q         ? cu_q
                                            : to_device(p.cu_kv, device)};
}

// The same for both passes of a problem.
bool goes_to_cudnn(const AttentionProblem& p) {
  if (!wanted_attention()) return false;
  AttentionShape shape = attention_shape(p);
  shape.generation = cuda::device_generation(p.q_THC.device().index());
  shape.cudnn_version = cudnn_attention_version();
  return choose_attention(shape, wanted_attention()).kernel == DeviceAttention::cudnn;
}

// The first sequences of a cache [B, S, G, C], as one packed tensor with room between them.
at::Tensor end_to_end(const at::Tensor& cache, int64_t sequences) {
  return cache.narrow(0, 0, sequences).reshape({sequences * cache.size(1), cache.size(2), cache.size(3)});
}

int64_t longest(const std::vector<int64_t>& cumulative) {
  int64_t length = 0;
  for (size_t i = 0; i + 1 < cumulative.size(); ++i) length = std::max(length, cumulative[i + 1] - cumulative[i]);
  return length;
}
// A bound on the queries of a sequence. At a bound of 1 with grouped heads the library folds the heads of a group into
// the queries, which takes exactly one query of every sequence for granted and lays the log-sum-exp out anew: `one`
// says that the caller has that and needs no gradients.
int64_t bound(const std::vector<int64_t>& cu_q, bool one) {
  return one && cu_q.back() == int64_t(cu_q.size()) - 1 ? longest(cu_q) : std::max<int64_t>(longest(cu_q), 2);
}

}  // namespace

bool attention_cuda_serves(const at::Tensor& q) {
  if (!q.is_cuda() || (q.scalar_type() != at::kBFloat16 && q.scalar_type() != at::kHalf) || q.size(0) == 0)
    return false;
  return q.size(2) % 8 == 0 && q.size(2) <= 256 && cuda::device_generation(q.device().index()) >= 8;
}

AttentionOutput attention_forward_cuda(const AttentionProblem& p) {
  const c10::DeviceGuard guard(p.q_THC.device());
  const DeviceLengths lengths = lengths_of(p);
  if (goes_to_cudnn(p)) return attention_forward_cudnn(p, lengths);
  const auto& [cu_q, cu_kv] = lengths;
  auto [out, lse_HT, rng_state, unused, debug] = at::_flash_attention_forward(
      p.q_THC, p.k_SGC, p.v_SGC, cu_q, cu_kv, bound(p.cu_q, false), longest(p.cu_kv), /*dropout_p=*/0.0,
      /*is_causal=*/true, /*return_debug_mask=*/false, p.scale, left(p.window), right(p.window));
  return {out, lse_HT.transpose(0, 1), {cu_q, cu_kv, rng_state, unused}};
}

AttentionGradients attention_backward_cuda(const AttentionProblem& p, const AttentionOutput& output,
                                           const at::Tensor& dout) {
  const c10::DeviceGuard guard(p.q_THC.device());
  if (goes_to_cudnn(p)) return attention_backward_cudnn(p, output, dout);
  const DeterministicAlgorithms deterministic;
  auto [dq, dk, dv] = at::_flash_attention_backward(
      dout, p.q_THC, p.k_SGC, p.v_SGC, output.out_THC, output.lse_TH.transpose(0, 1), output.extra[0], output.extra[1],
      bound(p.cu_q, false), longest(p.cu_kv), /*dropout_p=*/0.0, /*is_causal=*/true, output.extra[2], output.extra[3],
      p.scale, left(p.window), right(p.window));
  return {dq, dk, dv};
}

at::Tensor attention_cached_cuda(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                                 const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& kv_lengths,
                                 int64_t window, double scale) {
  const c10::DeviceGuard guard(q.device());
  const int64_t sequences = int64_t(kv_lengths.size()), room = keys.size(1);
  std::vector<int64_t> begins;  // of each sequence's room; how much of it counts: kv_lengths
  for (int64_t i = 0; i <= sequences; ++i) begins.push_back(i * room);
  return std::get<0>(at::_flash_attention_forward(
      q.contiguous(), end_to_end(keys, sequences), end_to_end(values, sequences), to_device(cu_seqlens, q.device()),
      to_device(begins, q.device()), bound(cu_seqlens, true), *std::max_element(kv_lengths.begin(), kv_lengths.end()),
      /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false, scale, left(window), right(window),
      to_device(kv_lengths, q.device())));
}

at::Tensor attention_step_cuda(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                               const at::Tensor& lengths_B, int64_t window, double scale) {
  const c10::DeviceGuard guard(q.device());
  const int64_t B = q.size(0), room = keys.size(1);
  const at::Tensor sequence = at::arange(B + 1, lengths_B.options().dtype(at::kInt));
  return std::get<0>(at::_flash_attention_forward(q.contiguous(), end_to_end(keys, B), end_to_end(values, B), sequence,
                                                  sequence * room, /*max_q=*/1, /*max_k=*/room, /*dropout_p=*/0.0,
                                                  /*is_causal=*/true, /*return_debug_mask=*/false, scale, left(window),
                                                  right(window), (lengths_B + 1).to(at::kInt)));
}

}  // namespace moegraft::kernels

#endif  // MOEGRAFT_HAVE_CUDA
