#pragma once
// A sequence of device operations recorded once and launched again as a whole (a CUDA graph): for work of many small
// kernels whose launches cost more than their arithmetic, decoding above all.

#include <torch/types.h>

#include <functional>
#include <memory>
#include <string>

namespace moegraft::kernels {

// Why the decoder's operations cannot be recorded for such a model on this device; empty when they can: some path would
// ask the device for a number. expert_width 0: no experts.
std::string recording_obstacle(const at::Device& device, at::ScalarType dtype, int64_t num_experts, int64_t model_width,
                               int64_t expert_width, int64_t head_dim);

class LaunchGraph {
 public:
  // Runs `work` twice: in earnest, so that libraries set themselves up, and then only recording. It must launch the
  // same operations on the same memory both times, wait for nothing, and keep what it hands out alive; tensors that it
  // makes while recording are filled anew by each replay. Throws what `work` throws, and c10::Error where something in
  // it cannot be recorded; the device is as usable as before.
  LaunchGraph(const at::Device& device, const std::function<void()>& work);
  ~LaunchGraph();
  LaunchGraph(LaunchGraph&&) noexcept;
  LaunchGraph& operator=(LaunchGraph&&) noexcept;

  void replay();  // on the current stream

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace moegraft::kernels
