#pragma once
// A layer that keeps only its input and runs again during the backward pass (Chen et al., arXiv:1604.06174).

#include <functional>
#include <utility>

#include "libtorch.h"

namespace moegraft::model {

// (x, delta) -> (x', delta'); delta may be undefined. Must give the same values each time.
using LayerFunction = std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor& x, const at::Tensor& delta)>;

// Runs `layer` without recording; the backward pass runs `again` on the same input and goes through it. Leaves that the layer uses get their gradients there.
std::pair<at::Tensor, at::Tensor> recompute(const LayerFunction& layer, const LayerFunction& again, const at::Tensor& x, const at::Tensor& delta);

}  // namespace moegraft::model
