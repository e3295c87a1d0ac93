#include "moegraft/parallel/narrow_gradients.h"

#include "libtorch.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

namespace moegraft::parallel {
namespace {

struct Narrow : torch::autograd::PostAccumulateGradHook {
  void operator()(const at::Tensor& parameter) override {
    at::Tensor& grad = parameter.mutable_grad();
    grad = grad.to(at::kBFloat16);
  }
};

}  // namespace

NarrowGradients::NarrowGradients(model::ParameterRegistry& registry) : registry_(registry) {
  for (const auto& p : registry.all())
    if (p.tensor.requires_grad()) torch::autograd::impl::set_post_acc_grad_hooks(p.tensor, std::make_unique<Narrow>());
}

NarrowGradients::~NarrowGradients() {
  for (const auto& p : registry_.all())
    if (p.tensor.requires_grad()) torch::autograd::impl::set_post_acc_grad_hooks(p.tensor, nullptr);
}

}  // namespace moegraft::parallel
