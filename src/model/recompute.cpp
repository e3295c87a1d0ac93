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
  // anchor: an empty leaf that requires grad, so that the node exists even when only leaves inside the layer train.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& anchor,
                               const c10::intrusive_ptr<Node>& node) {
    at::NoGradGuard no_grad;
    ctx->save_for_backward({x});
    ctx->saved_data["node"] = c10::IValue::make_capsule(node);
    return node->layer(x.detach());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoGradMode grad(true);
    const auto node = c10::static_intrusive_pointer_cast<Node>(ctx->saved_data["node"].toCapsule());
    const at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_(true);
    variable_list results = node->again(x), recorded, their_grads;
    for (size_t i = 0; i < results.size(); ++i) {
      if (!results[i].requires_grad()) continue;
      recorded.push_back(results[i]);
      their_grads.push_back(grads[i]);
    }
    torch::autograd::backward(recorded, their_grads);
    return {x.grad(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::vector<at::Tensor> recompute(const LayerFunction& layer, const LayerFunction& again, const at::Tensor& x) {
  auto node = c10::make_intrusive<Node>();
  node->layer = layer;
  node->again = again;
  const at::Tensor anchor = at::empty({0}, at::TensorOptions(at::kFloat).device(x.device())).requires_grad_(true);
  return Recompute::apply(x, anchor, node);
}

}  // namespace moegraft::model
