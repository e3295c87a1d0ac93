#pragma once
// A CUDA graph emulated on the host: a replay runs what was recorded, on the memory that it had then, and no line of
// the code that launched it. The library's operations are seen through a dispatch key that it keeps for tests, the
// emulated device's through OnHost. Code that writes into a tensor in any other way is not recorded: a replay misses
// it, as a device's would. Include in one file of a test program.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "kernels/cuda/host_run.h"
#include "libtorch.h"
#include "moegraft/kernels/launch_graph.h"

namespace moegraft::kernels {

constexpr auto kRecorderKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

struct LaunchGraph::State {
  std::vector<std::function<void()>> launches;
  std::vector<std::pair<at::Tensor, at::Tensor>>
      before;  // what recording overwrites, and a copy: a device only records

  static inline State* recording = nullptr;
  static std::vector<at::Tensor> tensors(at::ArrayRef<c10::IValue> values) {
    std::vector<at::Tensor> out;
    for (const c10::IValue& value : values) {
      if (value.isTensor() && value.toTensor().defined()) out.push_back(value.toTensor());
      if (value.isTensorList())
        for (const at::Tensor& t : value.toTensorVector()) out.push_back(t);
    }
    return out;
  }
  static void record(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const c10::impl::ExcludeDispatchKeyGuard nested(kRecorderKey);
    const auto& arguments = op.schema().arguments();
    const torch::jit::Stack inputs(stack->end() - int64_t(arguments.size()), stack->end());
    for (size_t i = 0; i < inputs.size(); ++i)
      if (arguments[i].alias_info() && arguments[i].alias_info()->isWrite() && inputs[i].isTensor())
        recording->before.emplace_back(inputs[i].toTensor(), inputs[i].toTensor().clone());
    op.callBoxed(stack);
    const auto results = [](const torch::jit::Stack& s, size_t count) {
      return tensors(at::ArrayRef<c10::IValue>(s.data() + (s.size() - count), count));
    };
    const size_t returns = op.schema().returns().size();
    const std::vector<at::Tensor> given = tensors(inputs);
    std::vector<at::Tensor> made = results(*stack, returns);
    for (at::Tensor& t : made)  // views and what was written in place lie where they lay
      for (const at::Tensor& input : given)
        if (t.defined() && t.storage().data() == input.storage().data()) {
          t = at::Tensor();
          break;
        }
    recording->launches.push_back([op, inputs, made, results, returns] {
      torch::jit::Stack s = inputs;
      op.callBoxed(&s);
      const std::vector<at::Tensor> again = results(s, returns);
      for (size_t i = 0; i < made.size(); ++i)
        if (made[i].defined()) made[i].copy_(again[i]);
    });
  }
};

std::string recording_obstacle(const at::Device& device, at::ScalarType, int64_t, int64_t, int64_t, int64_t) {
  return emulated ? "" : "the model is on " + device.str();
}

LaunchGraph::LaunchGraph(const at::Device&, const std::function<void()>& work) : state_(std::make_unique<State>()) {
  work();
  struct Recording {
    explicit Recording(State& state) : include(kRecorderKey) {
      State::recording = &state, cuda::OnHost::record = &state.launches;
    }
    ~Recording() { State::recording = nullptr, cuda::OnHost::record = nullptr; }
    c10::impl::IncludeDispatchKeyGuard include;
  };
  {
    const Recording on(*state_);
    work();
  }
  for (auto it = state_->before.rbegin(); it != state_->before.rend(); ++it) it->first.copy_(it->second);
  state_->before.clear();
}
LaunchGraph::~LaunchGraph() = default;
LaunchGraph::LaunchGraph(LaunchGraph&&) noexcept = default;
LaunchGraph& LaunchGraph::operator=(LaunchGraph&&) noexcept = default;
void LaunchGraph::replay() {
  for (const auto& launch : state_->launches) launch();
}

namespace {
void record_operation(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  LaunchGraph::State::record(op, stack);
}
}  // namespace

}  // namespace moegraft::kernels

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&moegraft::kernels::record_operation>());
}
