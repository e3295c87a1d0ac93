// Cross-entropy of a linear head without holding the logits: rows in chunks, gradients formed on the way.
#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kChunkLogits = int64_t{1} << 23;  // 32 MiB of float32 logits at a time

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight, const at::Tensor& targets, double scale, bool need_h, bool need_w) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t rows = h.size(0), classes = weight.size(0), chunk = std::max<int64_t>(1, kChunkLogits / std::max<int64_t>(classes, 1));
    const at::Tensor w = weight.to(h.scalar_type());
    const auto wide = h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor total = at::zeros({}, h.options().dtype(wide));
    at::Tensor dh = need_h ? at::empty_like(h) : at::Tensor(), dw = need_w ? at::zeros(weight.sizes(), weight.options()) : at::Tensor();
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t count = std::min(chunk, rows - begin);
      const at::Tensor hc = h.narrow(0, begin, count), tc = targets.narrow(0, begin, count).unsqueeze(1);
      // Softmax in float32: the reference models upcast logits before the loss.
      at::Tensor logits = at::mm(hc, w.t()).to(wide);
      at::Tensor logp = at::log_softmax(logits, -1);
      total.sub_(logp.gather(1, tc).sum());
      if (!need_h && !need_w) continue;
      at::Tensor d = logp.exp_().scatter_add_(1, tc, at::full({count, 1}, -1.0, logp.options())).mul_(scale).to(h.scalar_type());
      if (need_h) {
        at::Tensor out = dh.narrow(0, begin, count);
        at::mm_out(out, d, w);
      }
      if (need_w) {
        if (dw.scalar_type() == d.scalar_type()) dw.addmm_(d.t(), hc);
        else dw.add_(at::mm(d.t(), hc));
      }
    }
    ctx->saved_data["dh"] = dh;
    ctx->saved_data["dw"] = dw;
    return total.mul_(scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto scaled = [&](const char* key) {
      const auto& value = ctx->saved_data[key];
      const at::Tensor g = value.isTensor() ? value.toTensor() : at::Tensor();
      return g.defined() ? g * grads[0].to(g.scalar_type()) : g;
    };
    return {scaled("dh"), scaled("dw"), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& h_XD, const at::Tensor& weight_VD, const at::Tensor& targets_X, double scale) {
  MOEGRAFT_INVARIANT(h_XD.dim() == 2 && weight_VD.size(1) == h_XD.size(1) && targets_X.size(0) == h_XD.size(0), "linear_cross_entropy: h ", h_XD.sizes(), ", weight ", weight_VD.sizes());
  const bool grad = at::GradMode::is_enabled();
  return LinearCrossEntropy::apply(h_XD.contiguous(), weight_VD, targets_X, scale, grad && h_XD.requires_grad(), grad && weight_VD.requires_grad());
}

}  // namespace moegraft::kernels
