#pragma once
// How the frozen experts of a layer lie in memory on a device.

#include <torch/types.h>

#include <vector>

namespace moegraft::kernels {

// Moves the experts' matrices (gate and up [F, D], down [D, F], one each per expert) into one storage for gate and up, [E, 2F, D], and one for down,
// [E, D, F], and makes the lists views of them: the device's grouped products then see a layer as one tensor, gate and up as one product. Lists that lie so
// already stay. Takes the layer's size once more while it runs.
void join_experts(std::vector<at::Tensor>& gate_FD, std::vector<at::Tensor>& up_FD, std::vector<at::Tensor>& down_DF);

}  // namespace moegraft::kernels
