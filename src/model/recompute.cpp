#include "recompute.h"

#include <torch/csrc/autograd/autograd.h>

namespace moegraft::model {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Node : torch::CustomClassHolder {
  LayerFunction layer, again;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  // anchor: an empty leaf that requires grad, so that the node exists even when only leaves inside the layer train. delta: one-dimensional when there is none.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& delta, const at::Tensor& anchor, const c10::intrusive_ptr<Node>& node) {
    at::NoGradGuard no_grad;
    ctx->save_for_backward({x, delta});
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    const auto [x_out, delta_out] = node->layer(x.detach(), delta.dim() == 1 ? at::Tensor() : delta.detach());
    return {x_out, delta_out};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoGradMode grad(true);
    const auto saved = ctx->get_saved_variables();
    const auto node = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule());
    const at::Tensor x = saved[0].detach().requires_grad_(true), delta = saved[1].dim() == 1 ? at::Tensor() : saved[1].detach().requires_grad_(true);
    const auto [x_out, delta_out] = node->again(x, delta);
    torch::autograd::backward({x_out, delta_out}, {grads[0], grads[1]});
    return {x.grad(), delta.defined() ? delta.grad() : at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> recompute(const LayerFunction& layer, const LayerFunction& again, const at::Tensor& x, const at::Tensor& delta) {
  auto node = c10::make_intrusive<Node>();
  node->layer = layer;
  node->again = again;
  const at::Tensor anchor = at::empty({0}, at::TensorOptions(at::kFloat).device(x.device())).requires_grad_(true);
  const auto out = Recompute::apply(x, delta.defined() ? delta : at::empty({0}, x.options().requires_grad(false)), anchor, node);
  return {out[0], out[1]};
}

}  // namespace moegraft::model
