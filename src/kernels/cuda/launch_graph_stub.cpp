// Linked where CUDA is off.

#include "moegraft/base/check.h"
#include "moegraft/kernels/launch_graph.h"

namespace moegraft::kernels {

std::string recording_obstacle(const at::Device& device, at::ScalarType, int64_t, int64_t, int64_t, int64_t) {
  return device.is_cuda() ? "this build has no CUDA" : "the model is on " + device.str();
}

struct LaunchGraph::State {};

LaunchGraph::LaunchGraph(const at::Device&, const std::function<void()>&) {
  fail<InvariantError>("a graph in a build without CUDA: ask recording_obstacle() first");
}
LaunchGraph::~LaunchGraph() = default;
LaunchGraph::LaunchGraph(LaunchGraph&&) noexcept = default;
LaunchGraph& LaunchGraph::operator=(LaunchGraph&&) noexcept = default;
void LaunchGraph::replay() {}

}  // namespace moegraft::kernels
