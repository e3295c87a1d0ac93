#pragma once
// Experts that visit the device a layer at a time: what OffloadedWeights (host memory) and parallel::ShardedWeights
// (the other processes) share.

#include <memory>
#include <vector>

#include "moegraft/model/weights.h"

namespace moegraft::model {

constexpr int64_t kRingBuffers = 2;  // one computes while the other is filled

// Which buffer each layer goes to, and which calls make a fetch of it: nothing but the sequence of calls decides.
class RingOrder {
 public:
  explicit RingOrder(int64_t buffers = kRingBuffers) : slots_(static_cast<size_t>(buffers)) {}

  int64_t find(int64_t layer) const;  // its buffer; -1: none holds it
  // The layer is wanted soon.
  struct Place {
    int64_t slot = 0;
    bool fetch = false;      // it was not there: the buffer is now to be filled with it
    bool under_way = false;  // what the buffer held until now was fetched and never asked for
  };
  Place prefetch(int64_t layer);
  int64_t use(int64_t layer);  // its buffer; the layer is in one

 private:
  struct Slot {
    int64_t layer = -1;
    int64_t used = 0;      // when it was asked for last
    bool awaited = false;  // prefetched, not yet asked for
  };
  std::vector<Slot> slots_;
  int64_t clock_ = 0;
};

// A ring of device buffers, each as large as the largest layer's experts. prefetch(l) starts to fill one; experts(l,
// ...) lets the current stream (on the CPU, the host) wait for it. A buffer whose weights somebody still holds
// (autograd, where a layer is not computed again) is left to them and replaced by a new one: slower, never wrong.
// RingOrder decides what is fetched when, so processes in step fetch in step.
class ExpertRing : public WeightProvider {
 public:
  // The next layer's experts, in rest's dtype; none for a dense layer.
  virtual void add_layer(const ExpertWeights& experts) = 0;
  // True when add_layer() copies, so that its tensors may be given up.
  virtual bool copies() const = 0;

  kernels::Matrix embedding_VD() override { return rest_->embedding_VD(); }
  kernels::Matrix head_VD() override { return rest_->head_VD(); }
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

 protected:
  // rest: everything but the experts, on the device that computes. buffers >= 2.
  ExpertRing(std::shared_ptr<WeightProvider> rest, int64_t buffers);

  // Takes note of a layer whose buffer needs room for `room` elements (0: as many as the layer has). Returns its
  // matrices in the order they have in a buffer: gate and up of each expert, then down of each.
  std::vector<at::Tensor> declare_layer(const ExpertWeights& experts, int64_t room = 0);
  // Starts to bring a layer into buffer number `slot`, after everything enqueued on the current stream so far (it may
  // still read the buffer).
  virtual void fetch(int64_t layer, int64_t slot, const at::Tensor& buffer) = 0;
  // What was last fetched into `slot` is needed now. May be called again.
  virtual void await(int64_t slot) = 0;

 private:
  struct Shape {
    int64_t first = 0, experts = 0, width = 0, depth = 0;  // E, F, D
  };
  void fill(int64_t slot, int64_t layer);

  std::shared_ptr<WeightProvider> rest_;
  std::vector<Shape> layers_;
  RingOrder order_;
  std::vector<at::Tensor> buffers_;
  int64_t largest_ = 0;
  Traffic traffic_;
};

}  // namespace moegraft::model
