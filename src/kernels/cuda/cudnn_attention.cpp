#ifdef MOEGRAFT_HAVE_CUDA

#include "cudnn_attention.h"

#include "moegraft/base/check.h"

#ifdef MOEGRAFT_HAVE_CUDNN_FRONTEND

#include <ATen/cudnn/Handle.h>
#include <cudnn_frontend.h>

#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "attention_choice.h"
#include "device_run.h"
#include "sequence_kernels.h"

namespace moegraft::kernels {
namespace {

namespace fe = cudnn_frontend;
using TensorPtr = std::shared_ptr<fe::graph::Tensor_attributes>;

// Names of a plan's tensors. Offsets in elements, as SequenceOffsets makes them.
enum Uid : int64_t {
  kQ = 1,
  kK,
  kV,
  kOut,
  kStats,
  kDOut,
  kDQ,
  kDK,
  kDV,
  kLengthsQ,
  kLengthsKv,
  kBeginQ,
  kBeginKv,
  kBeginStats
};
using Pointers = std::unordered_map<int64_t, void*>;

void check(fe::error_t error, const char* what) {
  MOEGRAFT_CHECK(error.is_good(), "cuDNN attention, ", what, ": ", error.get_message(),
                 "; --attention flash (model.attention: flash) goes without it");
}

// A graph with its plan, for a bucket of sizes.
class Plan {
 public:
  Plan(const AttentionShape& s, double scale, bool backward) : size_(bucket_of(s)), shape_(s) {
    graph_.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const TensorPtr lengths_q = indices(kLengthsQ, size_.sequences), lengths_kv = indices(kLengthsKv, size_.sequences);
    begin_q_ = indices(kBeginQ, size_.sequences + 1), begin_kv_ = indices(kBeginKv, size_.sequences + 1),
    begin_stats_ = indices(kBeginStats, size_.sequences + 1);
    const TensorPtr q = graph_.tensor(queries(kQ)), k = graph_.tensor(keys(kK)), v = graph_.tensor(keys(kV));
    // Of both passes: a query sees the keys up to itself, counted from the end of its sequence, and at most `window` of
    // them.
    const auto masked = [&](auto& options) -> auto& {
      options.set_attn_scale(float(scale)).set_padding_mask(true).set_seq_len_q(lengths_q).set_seq_len_kv(lengths_kv);
      options.set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT).set_diagonal_band_right_bound(0);
      options.set_max_total_seq_len_q(size_.queries).set_max_total_seq_len_kv(size_.keys);
      if (s.window > 0) options.set_diagonal_band_left_bound(int(s.window));
      return options;
    };
    if (!backward) {
      fe::graph::SDPA_attributes options;
      const auto [out, lse] = graph_.sdpa(q, k, v, masked(options.set_name("attention").set_generate_stats(true)));
      declare(out, queries(kOut));
      declare(lse, stats());
    } else {
      fe::graph::SDPA_backward_attributes options;
      const TensorPtr out = graph_.tensor(queries(kOut)), dout = graph_.tensor(queries(kDOut)),
                      lse = graph_.tensor(stats());
      const auto [dq, dk, dv] = graph_.sdpa_backward(
          q, k, v, out, dout, lse, masked(options.set_name("attention_backward").set_deterministic_algorithm(true)));
      declare(dq, queries(kDQ));
      declare(dk, keys(kDK));
      declare(dv, keys(kDV));
    }
    check(graph_.build(at::native::getCudnnHandle(), {fe::HeurMode_t::A}),
          backward ? "planning the backward pass" : "planning the forward pass");
    check(graph_.get_workspace_size(workspace_bytes_), "sizing its work space");
  }

  // On the current stream, which the handle follows.
  void run(Pointers pointers, const at::Device& device) const {
    const at::Tensor workspace =
        at::empty({std::max<int64_t>(workspace_bytes_, 1)}, at::TensorOptions(at::kByte).device(device));
    check(graph_.execute(at::native::getCudnnHandle(), pointers, workspace.data_ptr()), "launching");
  }

 private:
  using Attributes = fe::graph::Tensor_attributes;

  TensorPtr indices(Uid uid, int64_t count) {
    return graph_.tensor(Attributes()
                             .set_uid(uid)
                             .set_data_type(fe::DataType_t::INT32)
                             .set_dim({count, 1, 1, 1})
                             .set_stride({1, 1, 1, 1}));
  }
  // [sequences, heads, tokens, width] over rows of tokens; the first stride is not used where offsets are.
  Attributes rows(Uid uid, int64_t heads, int64_t longest, int64_t width, const TensorPtr& begin) const {
    return Attributes()
        .set_uid(uid)
        .set_dim({size_.sequences, heads, longest, width})
        .set_stride({longest * heads * width, width, heads * width, 1})
        .set_ragged_offset(begin);
  }
  Attributes queries(Uid uid) const { return rows(uid, shape_.heads, size_.longest_q, shape_.head_dim, begin_q_); }
  Attributes keys(Uid uid) const { return rows(uid, shape_.groups, size_.longest_kv, shape_.head_dim, begin_kv_); }
  Attributes stats() const {
    return rows(kStats, shape_.heads, size_.longest_q, 1, begin_stats_).set_data_type(fe::DataType_t::FLOAT);
  }
  static void declare(const TensorPtr& output, Attributes as) {
    output->set_output(true)
        .set_uid(as.get_uid())
        .set_dim(as.get_dim())
        .set_stride(as.get_stride())
        .set_ragged_offset(as.get_ragged_offset());
    if (as.get_data_type() != fe::DataType_t::NOT_SET) output->set_data_type(as.get_data_type());
  }

  const AttentionBucket size_;
  const AttentionShape shape_;
  fe::graph::Graph graph_;
  TensorPtr begin_q_, begin_kv_, begin_stats_;
  int64_t workspace_bytes_ = 0;
};

// Made once per bucket, device and pass; both autograd's threads and the caller's come here.
std::shared_ptr<const Plan> plan_for(const AttentionProblem& p, bool backward) {
  static std::mutex mutex;
  static std::map<
      std::tuple<int, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double>,
      std::shared_ptr<const Plan>>
      plans;
  const AttentionShape s = attention_shape(p);
  const AttentionBucket b = bucket_of(s);
  const std::lock_guard lock(mutex);
  auto& plan = plans[{p.q_THC.device().index(), backward, b.sequences, b.longest_q, b.longest_kv, b.queries, b.keys,
                      s.heads, s.groups, s.head_dim, s.window, p.scale}];
  if (!plan) plan = std::make_shared<const Plan>(s, p.scale, backward);
  return plan;
}

// Lengths and offsets of a problem's sequences, one int32 tensor: its parts in the order of SequenceOffsets.
at::Tensor ragged(const AttentionProblem& p, const DeviceLengths& lengths) {
  const int64_t bucket = bucket_of(attention_shape(p)).sequences;
  const at::Tensor all = at::empty({5, bucket + 1}, lengths.cu_q.options());
  int32_t* to = all.data_ptr<int32_t>();
  const int64_t step = bucket + 1;
  cuda::OnDevice::threads(
      cuda::SequenceOffsets{lengths.cu_q.const_data_ptr<int32_t>(), lengths.cu_kv.const_data_ptr<int32_t>(),
                            p.num_sequences(), bucket, int32_t(p.heads() * p.head_dim()),
                            int32_t(p.groups() * p.head_dim()), int32_t(p.heads()), to, to + step, to + 2 * step,
                            to + 3 * step, to + 4 * step},
      step);
  return all;
}
void add_ragged(Pointers& pointers, const at::Tensor& all) {
  int64_t row = 0;
  for (const Uid uid : {kLengthsQ, kLengthsKv, kBeginQ, kBeginKv, kBeginStats}) pointers[uid] = all[row++].data_ptr();
}

}  // namespace

int64_t cudnn_attention_version() { return int64_t(cudnnGetVersion()); }

AttentionOutput attention_forward_cudnn(const AttentionProblem& p, const DeviceLengths& lengths) {
  AttentionOutput out{at::empty_like(p.q_THC),
                      at::empty({p.q_THC.size(0), p.heads()}, p.q_THC.options().dtype(at::kFloat)),
                      {ragged(p, lengths)}};
  Pointers pointers{{kQ, p.q_THC.data_ptr()},
                    {kK, p.k_SGC.data_ptr()},
                    {kV, p.v_SGC.data_ptr()},
                    {kOut, out.out_THC.data_ptr()},
                    {kStats, out.lse_TH.data_ptr()}};
  add_ragged(pointers, out.extra[0]);
  plan_for(p, false)->run(std::move(pointers), p.q_THC.device());
  return out;
}

AttentionGradients attention_backward_cudnn(const AttentionProblem& p, const AttentionOutput& output,
                                            const at::Tensor& dout) {
  const AttentionGradients g{at::empty_like(p.q_THC), at::empty_like(p.k_SGC), at::empty_like(p.v_SGC)};
  Pointers pointers{{kQ, p.q_THC.data_ptr()},          {kK, p.k_SGC.data_ptr()},           {kV, p.v_SGC.data_ptr()},
                    {kOut, output.out_THC.data_ptr()}, {kStats, output.lse_TH.data_ptr()}, {kDOut, dout.data_ptr()},
                    {kDQ, g.q_THC.data_ptr()},         {kDK, g.k_SGC.data_ptr()},          {kDV, g.v_SGC.data_ptr()}};
  add_ragged(pointers, output.extra[0]);
  plan_for(p, true)->run(std::move(pointers), p.q_THC.device());
  return g;
}

}  // namespace moegraft::kernels

#else  // MOEGRAFT_HAVE_CUDNN_FRONTEND

namespace moegraft::kernels {

int64_t cudnn_attention_version() { return 0; }
AttentionOutput attention_forward_cudnn(const AttentionProblem&, const DeviceLengths&) {
  fail<InvariantError>("cuDNN attention in a build without cudnn-frontend's headers: ask choose_attention first");
}
AttentionGradients attention_backward_cudnn(const AttentionProblem&, const AttentionOutput&, const at::Tensor&) {
  fail<InvariantError>("cuDNN attention in a build without cudnn-frontend's headers: ask choose_attention first");
}

}  // namespace moegraft::kernels

#endif  // MOEGRAFT_HAVE_CUDNN_FRONTEND
#endif  // MOEGRAFT_HAVE_CUDA
