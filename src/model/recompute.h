#pragma once
// A layer that keeps only its input and runs again during the backward pass (Chen et al., arXiv:1604.06174).

#include <functional>
#include <vector>

#include "libtorch.h"

namespace moegraft::model {

// The residual stream through a layer, and after it whatever else the layer gives (floating). Must give the same values
// each time.
using LayerFunction = std::function<std::vector<at::Tensor>(const at::Tensor& x)>;

// Runs `layer` without recording; the backward pass runs `again` on the same input and goes through it. Leaves that the
// layer uses get their gradients there.
std::vector<at::Tensor> recompute(const LayerFunction& layer, const LayerFunction& again, const at::Tensor& x);

}  // namespace moegraft::model
