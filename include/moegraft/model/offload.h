#pragma once
// Experts that stay in host memory and visit the device a layer at a time: for bases larger than the device's memory.

#include <memory>
#include <optional>
#include <vector>

#include "moegraft/model/weights.h"

namespace moegraft::model {

// A ring of device buffers, each as large as the largest layer's experts. prefetch(l) starts a copy on a stream of its own; experts(l, ...) lets the current
// stream wait for it (the host never waits). A buffer is filled again only after everything that was enqueued on the current stream by then; one whose
// weights somebody still holds (autograd, where a layer is not computed again) is left to them and replaced by a new one: slower, never wrong.
// On the CPU the copies happen at once: the same logic, for tests.
class OffloadedWeights : public WeightProvider {
 public:
  // rest: everything but the experts, on the device that computes. buffers >= 2.
  explicit OffloadedWeights(std::shared_ptr<WeightProvider> rest, int64_t buffers = 2);
  ~OffloadedWeights() override;

  // The next layer's experts, in host memory and rest's dtype; none for a dense layer. With a CUDA device they are copied into page-locked memory; otherwise
  // kept as they are (mapped, say).
  void add_layer(const ExpertWeights& host);

  at::Tensor embedding_VD() override { return rest_->embedding_VD(); }
  at::Tensor head_VD() override { return rest_->head_VD(); }
  Panels head_panels() override { return rest_->head_panels(); }
  at::Tensor final_norm_D() override { return rest_->final_norm_D(); }
  LayerWeights layer(int64_t index) override { return rest_->layer(index); }
  ExpertWeights experts(int64_t layer, int64_t first, int64_t count) override;
  void prefetch(int64_t layer) override;
  bool transient() const override { return true; }
  at::ScalarType dtype() const override { return rest_->dtype(); }
  at::Device device() const override { return rest_->device(); }

  struct Traffic {
    int64_t copies = 0;    // of layers to the device
    int64_t late = 0;      // of those, started only when the layer was asked for
    int64_t replaced = 0;  // buffers left to whoever held them
  };
  const Traffic& traffic() const { return traffic_; }

 private:
  struct Layer {
    std::vector<at::Tensor> parts;  // in the order they have in a buffer: gate and up of each expert, then down of each
    int64_t experts = 0, width = 0, depth = 0;  // E, F, D
    int64_t numel() const { return 3 * experts * width * depth; }
  };
  struct Slot;  // a buffer
  Slot* find(int64_t layer);
  Slot& choose();
  void fill(Slot& slot, int64_t layer);

  std::shared_ptr<WeightProvider> rest_;
  std::vector<Layer> layers_;
  std::vector<std::unique_ptr<Slot>> ring_;
  int64_t largest_ = 0, clock_ = 0;
  Traffic traffic_;
};

}  // namespace moegraft::model
