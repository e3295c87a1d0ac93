#pragma once
// The frozen experts of a layer: one matrix each, and how they lie in memory on a device.

#include <torch/types.h>

#include <memory>
#include <vector>

namespace moegraft::kernels {

// One matrix of every expert of a layer, all of one shape. Copies share the list: a layer of 128 experts is handed from
// call to call without counting 384 references, and whether its matrices lie as one tensor is looked up once. Const
// calls may come from several threads.
class ExpertMatrices {
 public:
  ExpertMatrices() = default;
  ExpertMatrices(std::vector<at::Tensor> list);  // NOLINT: a list is one

  const std::vector<at::Tensor>& list() const;
  operator const std::vector<at::Tensor>&() const { return list(); }
  size_t size() const { return list().size(); }
  bool empty() const { return list().empty(); }
  const at::Tensor& operator[](size_t e) const { return list()[e]; }
  const at::Tensor& front() const { return list().front(); }
  const at::Tensor& back() const { return list().back(); }
  auto begin() const { return list().begin(); }
  auto end() const { return list().end(); }

  // All as one [E, m, n] view where they lie at one distance in one storage; undefined otherwise.
  const at::Tensor& stacked() const;

  // The list to be changed: no longer shared.
  std::vector<at::Tensor>& own();
  void push_back(at::Tensor t) { own().push_back(std::move(t)); }

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// Moves the experts' matrices (gate and up [F, D], down [D, F]) into one storage for gate and up, [E, 2F, D], and one
// for down, [E, D, F], and makes the lists views of them: the device's grouped products then see a layer as one tensor,
// gate and up as one product. Lists that lie so already stay. Takes the layer's size once more while it runs.
void join_experts(ExpertMatrices& gate_FD, ExpertMatrices& up_FD, ExpertMatrices& down_DF);

}  // namespace moegraft::kernels
