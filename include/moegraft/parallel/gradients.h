#pragma once
// Gradients summed over the processes while the backward pass is still running.

#include <memory>
#include <vector>

#include "moegraft/distributed/world.h"
#include "moegraft/model/registry.h"

namespace moegraft::parallel {

// Replicated parameters are summed over the world, expert ones over the data group. Gradients lie in buckets, filled
// from the last layer to the first, and a bucket's all-reduce starts as soon as all its gradients and those of all
// earlier buckets are there: the order is the same on every rank, whichever of them has a gradient. On CUDA the sums
// run beside the backward pass. The result depends on the layout alone, not on timing.
//
//   reducer.begin_step();                       // instead of registry.zero_grad()
//   for (each micro-batch i) {
//     if (i is the last) reducer.last_backward();  // only this one communicates
//     if (loss.requires_grad()) loss.backward();
//   }
//   reducer.finish();
class GradientReducer {
 public:
  // The registry is complete, outlives this and is equal on all ranks (names and, per expert group member, shapes).
  // Collective: makes groups of its own. dtype: what gradients are kept in, float32 or bfloat16. The sums over
  // processes are float32's either way: a bf16 bucket travels as a float32 copy, kUnderWay of them at a time, and is
  // rounded when it comes back.
  GradientReducer(model::ParameterRegistry& registry, const distributed::Mesh& mesh, int64_t bucket_bytes,
                  at::ScalarType dtype = at::kFloat);
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;

  // Every gradient becomes zeros that the backward passes add to.
  void begin_step();
  void last_backward();
  // Collective. Afterwards every gradient is the sum over its group, or undefined where no member had one. Waits for
  // the host's part only: on CUDA the current stream waits for the sums.
  void finish();

  static constexpr size_t kUnderWay = 4;
  // Elements that a gradient takes in a bucket: each begins on a cache line.
  static constexpr int64_t room(int64_t numel) { return (numel + kAlignment - 1) / kAlignment * kAlignment; }
  int64_t num_buckets() const { return static_cast<int64_t>(buckets_.size()); }
  distributed::Traffic take_traffic();  // of both groups, since the last call

 private:
  static constexpr int64_t kAlignment = 16;  // elements of float32
  struct Hook;
  struct Bucket {
    std::shared_ptr<distributed::Communicator> group;  // null: nothing to add, every expert is here once
    at::Tensor flat;                                   // float32 or bfloat16
    at::Tensor wide;                                   // while it travels: flat itself, or a float32 copy
    std::vector<size_t> parameters;
    int64_t missing = 0;
    distributed::Pending sum;
  };
  struct Place {
    bool reduced = false;  // part of this: it requires a gradient
    size_t bucket = 0;
    at::Tensor view;  // of the bucket, in the parameter's shape
    bool present = false, arrived = false;
  };
  void arrived(size_t parameter);
  void start_ready();
  void start(Bucket& bucket, size_t index);
  void settle(Bucket& bucket);
  void share_presence();

  model::ParameterRegistry& registry_;
  distributed::Mesh mesh_;
  std::shared_ptr<distributed::Communicator> world_, data_;  // data_: null when every expert is here once
  std::vector<Bucket> buckets_;
  std::vector<Place> places_;         // in the registry's order
  size_t started_ = 0, settled_ = 0;  // buckets
  bool communicating_ = false;
};

}  // namespace moegraft::parallel
