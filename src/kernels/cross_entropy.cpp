// Cross-entropy of a linear head without holding the logits: rows in chunks, gradients formed on the way.
#include "libtorch.h"

#include "cpu/panels.h"
#include "cuda/ops.h"
#include "implementations.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kChunkLogits = int64_t{1} << 23;      // 32 MiB of float32 logits at a time
constexpr int64_t kChunkLogitsCuda = int64_t{1} << 28;  // 512 MiB of bf16 ones: at 151,936 classes 1,536 rows, enough
                                                        // tiles of the way back for every multiprocessor
constexpr int64_t kTileRows = 256;                      // of the largest tiles of a GPU's products

// Frozen heads on the CPU: each task takes a few rows through logits, softmax and back while they are in cache. Returns
// the sum over rows of -log p.
template <class T>
double blocks(const at::Tensor& h, WeightPanels& head, const at::Tensor& targets, double scale, const at::Tensor& dh) {
  constexpr int64_t kBytes = int64_t{12} << 20, kDepth = 512;  // logits of a task; depth of a step of the way back
  const int64_t rows = h.size(0), D = h.size(1), ld = copied_depth<T>(D);
  const Panels<T> forward = head.template forward<T>(),
                  backward = dh.defined() ? head.template backward<T>() : Panels<T>{};
  // Rows off the powers of two, which would put them into few sets of the caches.
  const int64_t V = forward.n, ld_logits = round_up(V, kPanel) + 16, ld_d = copied_depth<T>(round_up(V, kDepth)),
                Dp = round_up(D, kPanel) + 16;
  const int64_t share =
      round_up((rows + at::get_num_threads() - 1) / at::get_num_threads(), 32);  // few rows: something for every thread
  const int64_t chunk = std::min(share, std::clamp<int64_t>(kBytes / (V * 6) / 32 * 32, 32, 256));
  const int64_t* target = targets.const_data_ptr<int64_t>();
  std::vector<double> loss(rows);
  for_each_task((rows + chunk - 1) / chunk, [&](int64_t task, Scratch& scratch) {
    const int64_t begin = task * chunk, n = std::min(chunk, rows - begin);
    T* x = scratch.take<T>(chunk * ld);
    copy_rows(data<T>(h) + begin * D, D, n, D, x, ld);
    float* logits = scratch.take<float>(chunk * ld_logits);
    product(n, x, ld, forward, logits, ld_logits, false);
    T* d = dh.defined() ? scratch.take<T>(chunk * ld_d) : nullptr;
    for (int64_t r = 0; r < n; ++r) {
      const float* row = logits + r * ld_logits;
      loss[begin + r] = double(loops<T>().cross_entropy(row, V, round_up(V, kDepth), target[begin + r], float(scale),
                                                        d ? d + r * ld_d : nullptr)) -
                        double(row[target[begin + r]]);
    }
    if (!d) return;
    float* c = scratch.take<float>(chunk * Dp);
    for (int64_t v = 0; v < V; v += kDepth)
      product(n, d + v, ld_d, backward.depth_range(v, std::min(kDepth, V - v)), c, Dp, v > 0);
    loops<T>().round_rows(c, Dp, mutable_data<T>(dh) + begin * D, D, n, D);
  });
  double total = 0;
  for (const double l : loss) total += l;
  return total;
}

// h [X, D] W^T in float32 and d [X, V] W, for bf16 on a CPU: logits rounded to bf16 lose 2^-9 of their size, so that a
// loss of 17 is off by 0.01. The weight is widened a piece at a time.
constexpr int64_t kPieceElements = int64_t{1} << 23;
template <class F>
void in_pieces(const at::Tensor& w, const F& f) {
  const int64_t step = std::max<int64_t>(1, kPieceElements / std::max<int64_t>(w.size(1), 1));
  for (int64_t v = 0; v < w.size(0); v += step) {
    const int64_t n = std::min(step, w.size(0) - v);
    f(v, n, w.narrow(0, v, n).to(at::kFloat));
  }
}
at::Tensor wide_logits(const at::Tensor& h, const at::Tensor& w) {
  const at::Tensor h32 = h.to(at::kFloat), logits = at::empty({h.size(0), w.size(0)}, h32.options());
  in_pieces(
      w, [&](int64_t v, int64_t n, const at::Tensor& piece) { logits.narrow(1, v, n).copy_(at::mm(h32, piece.t())); });
  return logits;
}
at::Tensor wide_gradient(const at::Tensor& d32, const at::Tensor& w) {
  at::Tensor dh = at::zeros({d32.size(0), w.size(1)}, d32.options());
  in_pieces(w, [&](int64_t v, int64_t n, const at::Tensor& piece) { dh.addmm_(d32.narrow(1, v, n), piece); });
  return dh;
}

struct LossCall {
  const at::Tensor &h, &weight, &targets;
  double scale;
  bool need_h, need_w;
  WeightPanels* panels;  // of frozen heads that have them for h's dtype (weight is then empty); null: none
};
struct Loss {
  at::Tensor sum, dh, dw;
};
bool blocks_serve(const LossCall& c) { return c.panels != nullptr; }
Loss run_blocks(const LossCall& c) {
  const at::Tensor dh = c.need_h ? at::empty_like(c.h) : at::Tensor(), on_cpu = c.targets.contiguous();
  const double sum = c.h.scalar_type() == at::kFloat ? blocks<float>(c.h, *c.panels, on_cpu, c.scale, dh)
                                                     : blocks<bf16>(c.h, *c.panels, on_cpu, c.scale, dh);
  return {at::scalar_tensor(sum * c.scale, c.h.options().dtype(at::kFloat)), dh, {}};
}

// Adds the rows' losses to `total`; with need_d the logits become scale * (softmax - onehot). Softmax in float32: the
// reference models upcast logits before the loss.
struct SoftmaxLoss {
  bool (*serves)(const at::Tensor& logits);
  void (*run)(at::Tensor& logits, const at::Tensor& targets_X1, double scale, bool need_d, const at::Tensor& total);
};
constexpr SoftmaxLoss kSoftmaxLoss[]{
    {cuda::serves,
     [](at::Tensor& d, const at::Tensor& targets, double scale, bool need_d, const at::Tensor& total) {
       total.add_(cuda::cross_entropy_rows(d, targets, scale, need_d ? d : at::Tensor()).sum());
     }},
    {kAlways,
     [](at::Tensor& d, const at::Tensor& targets, double scale, bool need_d, const at::Tensor& total) {
       at::Tensor logp = at::log_softmax(d.to(total.scalar_type()), -1);
       total.sub_(logp.gather(1, targets).sum());
       if (need_d)
         d = logp.exp_().scatter_add_(1, targets, at::full(targets.sizes(), -1.0, logp.options())).mul_(scale);
     }},
};

// The library's products.
Loss run_chunks(const LossCall& call) {
  const auto& [h, weight, targets, scale, need_h, need_w, panels] = call;
  const int64_t rows = h.size(0), chunk = cross_entropy_chunk(rows, weight.size(0), h.is_cuda());
  const at::Tensor w = weight.to(h.scalar_type());
  at::Tensor total = at::zeros({}, h.options().dtype(h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  at::Tensor dh = need_h ? at::empty_like(h) : at::Tensor(),
             dw = need_w ? at::zeros(weight.sizes(), weight.options()) : at::Tensor();
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t count = std::min(chunk, rows - begin);
    const at::Tensor hc = h.narrow(0, begin, count), tc = targets.narrow(0, begin, count).unsqueeze(1);
    const bool need_d = need_h || need_w, widens = h.is_cpu() && h.scalar_type() == at::kBFloat16 && !cuda::serves(hc);
    at::Tensor d = widens ? wide_logits(hc, w) : at::mm(hc, w.t());
    choose(kSoftmaxLoss, d).run(d, tc, scale, need_d, total);
    if (!need_d) continue;
    if (need_h && widens) dh.narrow(0, begin, count).copy_(wide_gradient(d, w));
    d = d.to(h.scalar_type());
    if (need_h && !widens) {
      at::Tensor out = dh.narrow(0, begin, count);
      at::mm_out(out, d, w);
    }
    if (need_w) {
      if (dw.scalar_type() == d.scalar_type())
        dw.addmm_(d.t(), hc);
      else
        dw.add_(at::mm(d.t(), hc));
    }
  }
  return {total.mul_(scale), dh, dw};
}

struct Implementation {
  bool (*serves)(const LossCall&);
  Loss (*run)(const LossCall&);
};
constexpr Implementation kImplementations[]{{blocks_serve, run_blocks}, {kAlways, run_chunks}};

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight,
                            const at::Tensor& targets, double scale, bool need_h, bool need_w, WeightPanels* panels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const LossCall call{h, weight, targets, scale, need_h, need_w, panels};
    const Loss loss = choose(kImplementations, call).run(call);
    ctx->saved_data["dh"] = loss.dh;
    ctx->saved_data["dw"] = loss.dw;
    return loss.sum;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto scaled = [&](const char* key) {
      const auto& value = ctx->saved_data[key];
      const at::Tensor g = value.isTensor() ? value.toTensor() : at::Tensor();
      return g.defined() ? g * grads[0].to(g.scalar_type()) : g;
    };
    return {scaled("dh"), scaled("dw"), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

int64_t cross_entropy_chunk(int64_t rows, int64_t classes, bool on_cuda) {
  classes = std::max<int64_t>(classes, 1);
  if (!on_cuda) return std::max<int64_t>(1, kChunkLogits / classes);
  // Whole tiles, in chunks of about one size: a short last one would leave multiprocessors idle.
  const int64_t most = std::max(kTileRows, kChunkLogitsCuda / classes / kTileRows * kTileRows),
                chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return round_up(std::max<int64_t>(1, (rows + chunks - 1) / chunks), kTileRows);
}

at::Tensor linear_cross_entropy(const at::Tensor& h_XD, const Matrix& weight_VD, const at::Tensor& targets_X,
                                double scale) {
  RECORD_FUNCTION("moegraft::linear_cross_entropy", {});
  MOEGRAFT_INVARIANT(h_XD.dim() == 2 && weight_VD.columns() == h_XD.size(1) && targets_X.size(0) == h_XD.size(0),
                     "linear_cross_entropy: h ", h_XD.sizes(), ", weight ", weight_VD.rows(), " x ",
                     weight_VD.columns());
  const bool grad = at::GradMode::is_enabled();
  const bool frozen = weight_VD.quantised() || !weight_VD.tensor().requires_grad();
  WeightPanels* panels = frozen && h_XD.is_cpu() && weight_VD.packed() && weight_VD.packed()->serve(h_XD.scalar_type())
                             ? weight_VD.packed().get()
                             : nullptr;
  return LinearCrossEntropy::apply(h_XD.contiguous(), panels ? at::empty({0}, h_XD.options()) : weight_VD.tensor(),
                                   targets_X, scale, grad && h_XD.requires_grad(), grad && !frozen, panels);
}

}  // namespace moegraft::kernels
