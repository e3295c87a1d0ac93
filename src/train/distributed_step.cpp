#include "moegraft/train/distributed_step.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/parallel/part.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::train {

DistributedStep::DistributedStep(const parallel::ParallelConfig& config, const distributed::Mesh& mesh,
                                 model::ParameterRegistry& registry, at::ScalarType gradients)
    : mesh_(mesh), registry_(registry), lockstep_(parallel::lockstep(mesh, config.shard_base)) {
  if (alone()) {
    if (gradients == at::kBFloat16) narrow_.emplace(registry);
    return;
  }
  reducer_.emplace(registry, mesh_, int64_t(config.bucket_mib * double(1 << 20)), gradients);
  if (config.shard_optimizer) updates_.emplace(registry, mesh_);
}

std::vector<bool> DistributedStep::owned() const { return updates_ ? updates_->owned() : std::vector<bool>(); }

void DistributedStep::begin_step() {
  if (reducer_)
    reducer_->begin_step();
  else
    registry_.zero_grad();
}
void DistributedStep::last_backward() {
  if (reducer_) reducer_->last_backward();
}
void DistributedStep::finish_backward() {
  if (reducer_) reducer_->finish();
}
void DistributedStep::forget_absent(const std::set<int64_t>& modalities) {
  if (!lockstep_) return;
  for (const auto& p : registry_.all()) {
    if (p.sharding != model::Sharding::expert || p.modalities.empty()) continue;
    if (std::none_of(p.modalities.begin(), p.modalities.end(), [&](int64_t m) { return modalities.contains(m); }))
      p.tensor.mutable_grad().reset();
  }
}
at::Tensor DistributedStep::queue_grad_squares() const {
  return train::queue_grad_squares(registry_, mesh_.expert.get());
}
double DistributedStep::grad_norm(const std::array<double, 2>& from_device) {
  return global_grad_norm(registry_, mesh_.expert.get(), from_device);
}
double DistributedStep::grad_norm() { return global_grad_norm(registry_, mesh_.expert.get()); }
void DistributedStep::share_updates() {
  if (updates_) updates_->share();
}

std::vector<double> DistributedStep::sum(const std::vector<double>& mine, const char* what) {
  if (alone()) return mine;
  at::Tensor sums = at::tensor(mine, at::kDouble);
  sum_in_place(sums, what);
  return {sums.const_data_ptr<double>(), sums.const_data_ptr<double>() + mine.size()};
}

std::vector<std::vector<double>> DistributedStep::gather(const std::vector<double>& mine, const char* what) {
  if (alone()) return {mine};
  return mesh_.world->all().all_gather_numbers(mine, what);
}

void DistributedStep::sum_in_place(at::Tensor& tensor, const char* what) {
  if (!alone()) mesh_.world->all().all_reduce(tensor, what).wait();
}

std::map<std::string, distributed::Traffic> DistributedStep::take_traffic(parallel::ShardedWeights* base) {
  std::map<std::string, distributed::Traffic> all;
  if (alone()) return all;
  all["gradients"] = reducer_->take_traffic();
  all["experts"] = mesh_.expert->take_traffic();
  all["updates"] = mesh_.world->all().take_traffic();
  all["updates"] += mesh_.data->take_traffic();
  if (base) all["base"] = base->take_traffic();
  return all;
}

void DistributedStep::heartbeat(int64_t step) {
  if (!alone()) mesh_.world->beat(step);
}

}  // namespace moegraft::train
