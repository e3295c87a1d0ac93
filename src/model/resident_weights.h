#pragma once
// The provider of a base that lies in memory as a whole, loaded, drawn or in training.

#include <memory>
#include <vector>

#include "loader.h"
#include "moegraft/base/check.h"
#include "moegraft/model/weights.h"

namespace moegraft::model {

// Mapped pages count as memory.
class ResidentWeights : public WeightProvider {
 public:
  kernels::Matrix embedding, head;
  at::Tensor final_norm;
  std::vector<LayerWeights> layers;
  std::vector<ExpertWeights> layer_experts;
  at::ScalarType type = at::kFloat;
  at::Device where = at::kCPU;
  bool trains = false;

  kernels::Matrix embedding_VD() override { return embedding; }
  kernels::Matrix head_VD() override { return head; }
  at::Tensor final_norm_D() override { return final_norm; }
  LayerWeights layer(int64_t index) override { return layers.at(index); }
  ExpertWeights experts(int64_t layer, int64_t first, int64_t count) override {
    const ExpertWeights& all = layer_experts.at(layer);
    const int64_t at = first - all.first;
    MOEGRAFT_INVARIANT(all.count() > 0, "layer ", layer,
                       " has no experts here: a dense layer, or a base loaded without them");
    MOEGRAFT_INVARIANT(at >= 0 && at + count <= all.count(), "experts ", first, "+", count, " of ", all.first, "+",
                       all.count());
    if (at == 0 && count == all.count()) return all;
    MOEGRAFT_INVARIANT(!all.gate_FD.empty(), "quantised experts are given as a whole");
    const auto slice = [&](const std::vector<at::Tensor>& v) {
      return std::vector<at::Tensor>(v.begin() + at, v.begin() + at + count);
    };
    ExpertWeights part{first, slice(all.gate_FD), slice(all.up_FD), slice(all.down_DF), {}, {}, {}, {}};
    if (all.gate_EFD.defined()) {
      part.gate_EFD = all.gate_EFD.narrow(0, at, count);
      part.up_EFD = all.up_EFD.narrow(0, at, count);
      part.down_EDF = all.down_EDF.narrow(0, at, count);
    }
    return part;
  }
  at::ScalarType dtype() const override { return type; }
  at::Device device() const override { return where; }
  bool trainable() const override { return trains; }
};

// UsageError: the device has no path for the format. A warning where a CPU can but gains nothing.
void check_format(kernels::WeightFormat format, at::Device device);

// What a frozen base wants once its tensors are all there: what is computed in float32 anyway is widened, matrices get
// their panels (lean: kernels::make_expert_panels), or become quantised. source: whose mapped pages may go once panels
// have been filled; null: none. UserError: a weight that the format cannot hold.
void finish_frozen(ResidentWeights& weights, bool lean, const std::shared_ptr<const TensorSource>& source = nullptr,
                   std::optional<kernels::WeightFormat> quantise = {});

}  // namespace moegraft::model
