#include "moegraft/train/optimizer.h"

#include <ATen/Parallel.h>
#include "libtorch.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::train {
namespace {

constexpr int64_t kNormChunk = 1 << 15;

double sum_of_squares(const float* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) lanes[j] += double(x[i + j]) * double(x[i + j]);
  double sum = 0;
  for (; i < n; ++i) sum += double(x[i]) * double(x[i]);
  for (const double lane : lanes) sum += lane;
  return sum;
}

double sum_of_squares_cpu(const at::Tensor& grad) {
  const auto dense = grad.contiguous();
  const float* data = dense.const_data_ptr<float>();
  const int64_t n = dense.numel(), chunks = (n + kNormChunk - 1) / kNormChunk;
  std::vector<double> partial(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) partial[c] = sum_of_squares(data + c * kNormChunk, std::min(kNormChunk, n - c * kNormChunk));
  });
  double sum = 0;
  for (const double p : partial) sum += p;
  return sum;
}

}  // namespace

double global_grad_norm(const model::ParameterRegistry& registry) {
  at::NoGradGuard no_grad;
  double sum = 0;
  std::vector<at::Tensor> on_device;
  for (const auto& parameter : registry.all()) {
    const auto& grad = parameter.tensor.grad();
    if (!grad.defined()) continue;
    if (grad.is_cpu())
      sum += sum_of_squares_cpu(grad);
    else
      on_device.push_back(at::linalg_vector_norm(grad, 2, std::nullopt, false, at::kDouble));
  }
  if (!on_device.empty()) sum += at::stack(on_device).square().sum().item<double>();  // the only sync
  return std::sqrt(sum);
}

double clip_grad_norm(model::ParameterRegistry& registry, double max_norm) {
  const double norm = global_grad_norm(registry);
  if (max_norm <= 0 || !std::isfinite(norm) || norm <= max_norm) return norm;
  at::NoGradGuard no_grad;
  for (const auto& parameter : registry.all())
    if (parameter.tensor.grad().defined()) parameter.tensor.grad().mul_(max_norm / norm);
  return norm;
}

AdamW::AdamW(model::ParameterRegistry& registry, std::map<std::string, GroupOptions> groups, AdamWOptions options)
    : registry_(registry), groups_(std::move(groups)), options_(options) {
  for (const auto& parameter : registry.all()) {
    if (!groups_.contains(parameter.group)) {
      std::vector<std::string> known;
      for (const auto& [name, group] : groups_) known.push_back(name);
      fail<UsageError>("parameter ", parameter.name, " is in the optimizer group \"", parameter.group, "\", which has no settings: known groups are ", join(known, ", "));
    }
    const auto zeros = at::zeros_like(parameter.tensor, at::TensorOptions().requires_grad(false));
    slots_.push_back({zeros, zeros.clone(), at::zeros({}, zeros.options())});
  }
}

int64_t AdamW::step(double lr_factor) {
  at::NoGradGuard no_grad;
  MOEGRAFT_INVARIANT(slots_.size() == registry_.all().size(), "the registry changed after the optimizer was made");
  ++steps_;
  int64_t updated = 0;
  for (const auto& [name, group] : groups_) {
    for (const bool decayed : {true, false}) {
      std::vector<at::Tensor> tensors, grads, exp_avgs, exp_avg_sqs, steps;
      for (size_t i = 0; i < slots_.size(); ++i) {
        const auto& parameter = registry_.all()[i];
        const auto& grad = parameter.tensor.grad();
        if (parameter.group != name || (parameter.tensor.dim() >= 2) != decayed || !grad.defined()) continue;
        tensors.push_back(parameter.tensor);
        grads.push_back(grad.contiguous());  // the fused kernel walks raw pointers
        exp_avgs.push_back(slots_[i].exp_avg);
        exp_avg_sqs.push_back(slots_[i].exp_avg_sq);
        steps.push_back(slots_[i].step.add_(1));  // the fused kernel reads the count and does not advance it
      }
      if (tensors.empty()) continue;
      at::_fused_adamw_(tensors, grads, exp_avgs, exp_avg_sqs, {}, steps, group.lr * lr_factor, options_.beta1, options_.beta2, decayed ? group.weight_decay : 0.0,
                        options_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
      updated += int64_t(tensors.size());
    }
  }
  return updated;
}

io::TensorMap AdamW::state() const {
  io::TensorMap state;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto& name = registry_.all()[i].name;
    state[name + ".exp_avg"] = slots_[i].exp_avg;
    state[name + ".exp_avg_sq"] = slots_[i].exp_avg_sq;
    state[name + ".step"] = slots_[i].step;
  }
  state["steps"] = at::scalar_tensor(steps_, at::kLong);
  return state;
}

void AdamW::load_state(const io::TensorMap& state) {
  at::NoGradGuard no_grad;
  std::set<std::string> known = {"steps"};
  for (const auto& parameter : registry_.all())
    for (const char* suffix : {".exp_avg", ".exp_avg_sq", ".step"}) known.insert(parameter.name + suffix);
  checkpoint::check_nothing_left(state, known);
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto& name = registry_.all()[i].name;
    checkpoint::restore_tensor(slots_[i].exp_avg, state, name + ".exp_avg");
    checkpoint::restore_tensor(slots_[i].exp_avg_sq, state, name + ".exp_avg_sq");
    checkpoint::restore_tensor(slots_[i].step, state, name + ".step");
  }
  const auto steps = at::scalar_tensor(0, at::kLong);
  checkpoint::restore_tensor(steps, state, "steps");
  steps_ = steps.item<int64_t>();
}

}  // namespace moegraft::train
