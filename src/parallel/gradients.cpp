#include "moegraft/parallel/gradients.h"

#include "libtorch.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <numeric>

#include "groups.h"
#include "moegraft/base/check.h"

namespace moegraft::parallel {

struct GradientReducer::Hook : torch::autograd::PostAccumulateGradHook {
  Hook(GradientReducer& reducer, size_t parameter) : reducer(reducer), parameter(parameter) {}
  void operator()(const at::Tensor&) override { reducer.arrived(parameter); }
  GradientReducer& reducer;
  size_t parameter;
};

GradientReducer::GradientReducer(model::ParameterRegistry& registry, const distributed::Mesh& mesh,
                                 int64_t bucket_bytes, at::ScalarType dtype)
    : registry_(registry), mesh_(mesh), world_(split_world(mesh, "gradients")), places_(registry.all().size()) {
  if (mesh_.expert_size() == 1)
    data_ = world_;
  else if (mesh_.data_size() > 1)
    data_ = split_data(mesh, "expert gradients");
  const auto& all = registry.all();
  std::vector<size_t> order(all.size());
  std::iota(order.rbegin(), order.rend(), size_t{0});
  // A backward pass finishes the last layer first. What is in no layer is used before the first one, or after the last:
  // behind all of them.
  const auto layer_of = [&](size_t i) { return all[i].layer.value_or(-1); };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return layer_of(a) > layer_of(b); });

  struct Open {
    std::vector<size_t> parameters;
    int64_t numel = 0;
  } open[2];  // replicated, expert
  const auto room_of = [&](size_t i) { return room(all[i].tensor.numel()); };
  const auto close = [&](int kind) {
    if (open[kind].parameters.empty()) return;
    Bucket bucket;
    bucket.group = kind == 0 ? world_ : data_;
    bucket.parameters = std::move(open[kind].parameters);
    bucket.flat =
        at::zeros({open[kind].numel}, all[bucket.parameters[0]].tensor.options().dtype(dtype).requires_grad(false));
    int64_t at_element = 0;
    for (const size_t i : bucket.parameters) {
      places_[i] = {true, buckets_.size(),
                    bucket.flat.narrow(0, at_element, all[i].tensor.numel()).view(all[i].tensor.sizes()), false, false};
      at_element += room_of(i);
    }
    buckets_.push_back(std::move(bucket));
    open[kind] = {};
  };
  for (const size_t i : order) {
    if (!all[i].tensor.requires_grad()) continue;
    const int kind = all[i].sharding == model::Sharding::expert ? 1 : 0;
    if (open[kind].numel > 0 && (open[kind].numel + room_of(i)) * 4 > bucket_bytes) close(kind);
    open[kind].parameters.push_back(i);
    open[kind].numel += room_of(i);
  }
  close(1);
  close(0);
  for (size_t i = 0; i < all.size(); ++i)
    if (places_[i].reduced)
      torch::autograd::impl::set_post_acc_grad_hooks(all[i].tensor, std::make_unique<Hook>(*this, i));
}

GradientReducer::~GradientReducer() {
  for (size_t i = 0; i < places_.size(); ++i)
    if (places_[i].reduced) torch::autograd::impl::set_post_acc_grad_hooks(registry_.all()[i].tensor, nullptr);
}

void GradientReducer::begin_step() {
  MOEGRAFT_INVARIANT(places_.size() == registry_.all().size(), "the registry changed after the reducer was made");
  for (auto& bucket : buckets_) {
    bucket.flat.zero_();
    bucket.missing = int64_t(bucket.parameters.size());
  }
  for (size_t i = 0; i < places_.size(); ++i) {
    const auto& parameter = registry_.all()[i];
    Place& place = places_[i];
    MOEGRAFT_INVARIANT(parameter.tensor.requires_grad() == place.reduced, "parameter ", parameter.name, " was ",
                       place.reduced ? "frozen" : "released", " after the reducer was made");
    place.present = place.arrived = false;
    if (place.reduced) parameter.tensor.mutable_grad() = place.view;
  }
  started_ = settled_ = 0;
  communicating_ = false;
}

void GradientReducer::last_backward() { communicating_ = true; }

// Called by the backward pass, on its thread and stream.
void GradientReducer::arrived(size_t parameter) {
  Place& place = places_[parameter];
  place.present = true;
  if (!communicating_) return;
  // Its sum may be on its way already: adding to it now would be lost on some ranks.
  MOEGRAFT_INVARIANT(!place.arrived, "the gradient of ", registry_.all()[parameter].name,
                     " arrived twice in one backward pass");
  place.arrived = true;
  --buckets_[place.bucket].missing;
  start_ready();
}

void GradientReducer::start_ready() {
  while (started_ < buckets_.size() && buckets_[started_].missing == 0) start(buckets_[started_], started_);
}

void GradientReducer::start(Bucket& bucket, size_t index) {
  ++started_;
  if (!bucket.group) return;
  bucket.wide = bucket.flat.to(at::kFloat);
  bucket.sum = bucket.group->all_reduce(bucket.wide, "gradients, bucket " + std::to_string(index));
  if (!bucket.wide.is_same(bucket.flat))
    while (started_ - settled_ > kUnderWay) settle(buckets_[settled_++]);
}

void GradientReducer::settle(Bucket& bucket) {
  bucket.sum.wait();
  bucket.sum = distributed::Pending();
  if (bucket.wide.defined() && !bucket.wide.is_same(bucket.flat)) bucket.flat.copy_(bucket.wide);
  bucket.wide.reset();
}

void GradientReducer::finish() {
  communicating_ = false;
  while (started_ < buckets_.size()) start(buckets_[started_], started_);
  share_presence();
  while (settled_ < buckets_.size()) settle(buckets_[settled_++]);
  for (size_t i = 0; i < places_.size(); ++i)
    if (!places_[i].present) registry_.all()[i].tensor.mutable_grad().reset();
}

// One sum over the world for both kinds: each expert index has its own places.
void GradientReducer::share_presence() {
  if (world_->size() == 1) return;
  const auto& all = registry_.all();
  const int64_t N = int64_t(all.size());
  at::Tensor counts = at::zeros({1 + mesh_.expert_size(), N}, at::kLong);  // on the host, which has to know
  const int64_t mine = 1 + mesh_.expert->rank();
  const auto line = [&](size_t i) { return (all[i].sharding == model::Sharding::expert ? mine : 0) * N + int64_t(i); };
  int64_t* count = counts.data_ptr<int64_t>();
  for (size_t i = 0; i < all.size(); ++i) count[line(i)] = places_[i].present;
  world_->all_reduce(counts, "which parameters have gradients").wait();
  for (size_t i = 0; i < all.size(); ++i) places_[i].present = count[line(i)] > 0;
}

distributed::Traffic GradientReducer::take_traffic() {
  distributed::Traffic sum = world_->take_traffic();
  if (data_ && data_ != world_) sum += data_->take_traffic();
  return sum;
}

}  // namespace moegraft::parallel
