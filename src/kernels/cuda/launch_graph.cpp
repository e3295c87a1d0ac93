// CUDA graphs by the library's wrapper, which gives a graph's tensors a memory pool of their own (launch_graph_stub.cpp
// where CUDA is off).

#ifdef MOEGRAFT_HAVE_CUDA

#include "moegraft/kernels/launch_graph.h"

#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>

#include "../moe.h"
#include "device_run.h"

namespace moegraft::kernels {

std::string recording_obstacle(const at::Device& device, at::ScalarType dtype, int64_t num_experts, int64_t model_width,
                               int64_t expert_width, int64_t head_dim) {
  if (!device.is_cuda()) return "the model is on " + device.str();
  if (dtype != at::kBFloat16)
    return std::string("the model is in ") + c10::toString(dtype) +
           ", and only bfloat16 runs without asking the device";
  if (const int major = cuda::device_generation(device.index() < 0 ? 0 : device.index()); !moe_cuda_runs_on(major))
    return "a device of generation " + std::to_string(major) +
           " runs grouped products expert by expert: Hopper (9) or data-centre Blackwell (10) is needed";
  if (head_dim % 8 != 0 || head_dim > 256)
    return "heads of " + std::to_string(head_dim) + " do not fit the flash kernels (a multiple of 8, at most 256)";
  if (expert_width > 0 && !moe_cuda_fits(num_experts, model_width, expert_width))
    return std::to_string(num_experts) + " experts of " + std::to_string(model_width) + " x " +
           std::to_string(expert_width) + " do not fit the grouped product (multiples of 8, at most 1023 experts)";
  return {};
}

struct LaunchGraph::State {
  at::cuda::CUDAGraph graph;
};

LaunchGraph::LaunchGraph(const at::Device& device, const std::function<void()>& work)
    : state_(std::make_unique<State>()) {
  const c10::cuda::CUDAGuard on_device(device);
  const auto outside = c10::cuda::getCurrentCUDAStream(),
             inside = c10::cuda::getStreamFromPool(/*isHighPriority=*/false);  // the default stream cannot be captured
  at::cuda::CUDAEvent ready, done;
  ready.record(outside);
  ready.block(inside);
  {
    const c10::cuda::CUDAStreamGuard guard(inside);
    work();
    inside.synchronize();
    // Other threads (data workers, the checkpoint writer) may allocate meanwhile: only this one is held to the rules of
    // a capture.
    state_->graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    try {
      work();
    } catch (...) {
      try {
        state_->graph
            .capture_end();  // frees the stream; reports the capture as broken, which is what is being reported already
      } catch (const c10::Error&) {}
      throw;
    }
    state_->graph.capture_end();
    done.record(inside);
  }
  done.block(outside);
}

LaunchGraph::~LaunchGraph() = default;
LaunchGraph::LaunchGraph(LaunchGraph&&) noexcept = default;
LaunchGraph& LaunchGraph::operator=(LaunchGraph&&) noexcept = default;

void LaunchGraph::replay() { state_->graph.replay(); }

}  // namespace moegraft::kernels

#endif  // MOEGRAFT_HAVE_CUDA
