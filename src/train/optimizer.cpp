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

// The rows of a parameter's moment (or of its scales, one per block) that are here.
struct Rows {
  int64_t first = 0, total = 0;
};
Rows rows_of(const model::Parameter& parameter, const char* suffix) {
  if (parameter.total_rows == 0 || std::string_view(suffix) == ".step") return {};
  if (!std::string_view(suffix).ends_with(".scales")) return {parameter.first_row, parameter.total_rows};
  const int64_t blocks_per_row = parameter.tensor[0].numel() / kernels::kAdamw8Block;
  return {parameter.first_row * blocks_per_row, parameter.total_rows * blocks_per_row};
}

constexpr int64_t kNormChunk = 1 << 15;
constexpr int64_t kWidened = int64_t{256} << 20;  // bytes of float32 copies of bf16 gradients at a time

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
  const auto dense = grad.to(at::kFloat).contiguous();
  const float* data = dense.const_data_ptr<float>();
  const int64_t n = dense.numel(), chunks = (n + kNormChunk - 1) / kNormChunk;
  std::vector<double> partial(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      partial[c] = sum_of_squares(data + c * kNormChunk, std::min(kNormChunk, n - c * kNormChunk));
  });
  double sum = 0;
  for (const double p : partial) sum += p;
  return sum;
}

}  // namespace

bool suits_8bit(const model::Parameter& parameter) {
  const auto& tensor = parameter.tensor;
  const int64_t rows = tensor.dim() > 0 ? tensor.size(0) : 1, row = rows > 0 ? tensor.numel() / rows : 0;
  const int64_t total = parameter.total_rows > 0 ? parameter.total_rows * row : tensor.numel();
  return total >= kSmallest8bit && (parameter.sharding != model::Sharding::expert || row % kernels::kAdamw8Block == 0);
}

at::Tensor sum_of_squares(const std::vector<at::Tensor>& tensors) {
  at::NoGradGuard no_grad;
  std::map<at::ScalarType, std::vector<at::Tensor>> lists;  // a list of several dtypes would be walked tensor by tensor
  for (const at::Tensor& t : tensors)
    if (t.numel() > 0)
      lists[t.scalar_type()].push_back(t);  // the library's kernel leaves an empty tensor's norm unwritten
  at::Tensor sum = at::zeros({}, (tensors.empty() ? at::TensorOptions() : tensors[0].options()).dtype(at::kDouble));
  for (const auto& [dtype, list] : lists) sum = sum + at::stack(at::_foreach_norm(list, 2, at::kDouble)).square().sum();
  return sum;
}

namespace {

// Whether a parameter's gradient is here alone, and not everywhere.
bool is_spread(const model::Parameter& parameter, const distributed::Communicator* experts) {
  return experts && experts->size() > 1 && parameter.sharding == model::Sharding::expert;
}

}  // namespace

at::Tensor queue_grad_squares(const model::ParameterRegistry& registry, const distributed::Communicator* experts) {
  std::vector<at::Tensor> lists[2];
  for (const auto& parameter : registry.all())
    if (const auto& grad = parameter.tensor.grad(); grad.defined() && !grad.is_cpu())
      lists[is_spread(parameter, experts)].push_back(grad);
  if (lists[0].empty() && lists[1].empty()) return {};
  const at::Tensor none = at::zeros({}, (lists[0].empty() ? lists[1] : lists[0])[0].options().dtype(at::kDouble));
  return at::stack(
      {lists[0].empty() ? none : sum_of_squares(lists[0]), lists[1].empty() ? none : sum_of_squares(lists[1])});
}

double global_grad_norm(const model::ParameterRegistry& registry, distributed::Communicator* experts,
                        const std::array<double, 2>& from_device) {
  at::NoGradGuard no_grad;
  std::array<double, 2> sums = from_device;
  for (const auto& parameter : registry.all())
    if (const auto& grad = parameter.tensor.grad(); grad.defined() && grad.is_cpu())
      sums[is_spread(parameter, experts)] += sum_of_squares_cpu(grad);
  if (experts && experts->size() > 1) {
    const at::Tensor mine = at::full({1}, sums[1], at::kDouble);
    at::Tensor all = at::empty({experts->size()}, at::kDouble);
    experts->all_gather(all, mine, "gradient norm").wait();
    for (int64_t r = 0; r < experts->size(); ++r) sums[0] += all[r].item<double>();
  }
  return std::sqrt(sums[0]);
}

double global_grad_norm(const model::ParameterRegistry& registry, distributed::Communicator* experts) {
  std::array<double, 2> sums{};
  if (const at::Tensor queued = queue_grad_squares(registry, experts); queued.defined()) {
    const at::Tensor host = queued.to(at::kCPU);
    sums = {host[0].item<double>(), host[1].item<double>()};
  }
  return global_grad_norm(registry, experts, sums);
}

double clip_factor(double norm, double max_norm) {
  return max_norm > 0 && std::isfinite(norm) && norm > max_norm ? max_norm / norm : 1.0;
}

std::vector<std::pair<const char*, at::Tensor>> AdamW::Slot::tensors() const {
  if (!owned) return {};
  if (!is_8bit) return {{".exp_avg", exp_avg}, {".exp_avg_sq", exp_avg_sq}, {".step", step}};
  return {{".exp_avg.codes", quantized.exp_avg.codes},
          {".exp_avg.scales", quantized.exp_avg.scales},
          {".exp_avg_sq_root.codes", quantized.root.codes},
          {".exp_avg_sq_root.scales", quantized.root.scales},
          {".step", step}};
}

AdamW::AdamW(model::ParameterRegistry& registry, std::map<std::string, GroupOptions> groups, AdamWOptions options,
             std::vector<bool> owned)
    : registry_(registry), groups_(std::move(groups)), options_(options), sharded_(!owned.empty()) {
  MOEGRAFT_INVARIANT(owned.empty() || owned.size() == registry.all().size(), "AdamW: ", owned.size(), " flags for ",
                     registry.all().size(), " parameters");
  for (const auto& parameter : registry.all()) {
    if (!groups_.contains(parameter.group)) {
      std::vector<std::string> known;
      for (const auto& [name, group] : groups_) known.push_back(name);
      fail<UsageError>("parameter ", parameter.name, " is in the optimizer group \"", parameter.group,
                       "\", which has no settings: known groups are ", join(known, ", "));
    }
    Slot slot;
    slot.owned = owned.empty() || owned[slots_.size()];
    slot.is_8bit = options_.moments_8bit && suits_8bit(parameter);
    if (slot.owned && slot.is_8bit) {
      slot.quantized = kernels::adamw8_zero_state(parameter.tensor);
      slot.step = at::zeros({}, at::kFloat);
    } else if (slot.owned) {
      slot.exp_avg = at::zeros_like(parameter.tensor, at::TensorOptions().requires_grad(false));
      slot.exp_avg_sq = slot.exp_avg.clone();
      slot.step = at::zeros({}, slot.exp_avg.options());
    }
    slots_.push_back(std::move(slot));
  }
}

int64_t AdamW::step(double lr_factor, double grad_factor) {
  at::NoGradGuard no_grad;
  MOEGRAFT_INVARIANT(slots_.size() == registry_.all().size(), "the registry changed after the optimizer was made");
  ++steps_;
  int64_t updated = 0;
  for (const auto& [name, group] : groups_) {
    for (const bool decayed : {true, false}) {
      const double lr = group.lr * lr_factor, weight_decay = decayed ? group.weight_decay : 0.0;
      std::vector<at::Tensor> tensors, grads, exp_avgs, exp_avg_sqs, steps;
      const auto update = [&] {
        if (tensors.empty()) return;
        at::_foreach_add_(steps, 1);        // the fused kernel reads the counts and does not advance them
        std::optional<at::Tensor> divisor;  // of the gradients; the kernel writes them back divided
        if (grad_factor != 1.0) divisor = at::full({}, 1.0 / grad_factor, tensors[0].options().requires_grad(false));
        at::_fused_adamw_(tensors, grads, exp_avgs, exp_avg_sqs, {}, steps, lr, options_.beta1, options_.beta2,
                          weight_decay, options_.epsilon, /*amsgrad=*/false,
                          /*maximize=*/false, divisor);
        for (const auto& t : tensors)
          t.unsafeGetTensorImpl()->bump_version();  // the fused operation does not count its writes
        for (auto* list : {&tensors, &grads, &exp_avgs, &exp_avg_sqs, &steps}) list->clear();
      };
      int64_t widened = 0;
      for (size_t i = 0; i < slots_.size(); ++i) {
        const auto& parameter = registry_.all()[i];
        if (!slots_[i].owned || parameter.group != name || (parameter.tensor.dim() >= 2) != decayed ||
            !parameter.tensor.grad().defined())
          continue;
        const auto grad = parameter.tensor.grad().to(at::kFloat).contiguous();  // the kernels walk raw pointers
        const auto& slot = slots_[i];
        ++updated;
        if (slot.is_8bit) {
          slot.step.add_(1);  // on the host
          kernels::adamw8_step(parameter.tensor, grad, slot.quantized,
                               {lr, options_.beta1, options_.beta2, options_.epsilon, weight_decay,
                                int64_t(slot.step.item<float>()), grad_factor});
          continue;
        }
        tensors.push_back(parameter.tensor);
        grads.push_back(grad);
        exp_avgs.push_back(slot.exp_avg);
        exp_avg_sqs.push_back(slot.exp_avg_sq);
        steps.push_back(slot.step);
        if (grad.is_same(parameter.tensor.grad()) || (widened += int64_t(grad.nbytes())) < kWidened) continue;
        update();
        widened = 0;
      }
      update();
    }
  }
  return updated;
}

io::TensorMap AdamW::state() const {
  io::TensorMap state;
  for (size_t i = 0; i < slots_.size(); ++i)
    for (const auto& [suffix, tensor] : slots_[i].tensors()) state[registry_.all()[i].name + suffix] = tensor;
  state["steps"] = at::scalar_tensor(steps_, at::kLong);
  return state;
}

checkpoint::Parts AdamW::state_parts() const {
  checkpoint::Parts parts;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto& parameter = registry_.all()[i];
    for (const auto& [suffix, tensor] : slots_[i].tensors()) {
      const auto [first, total] = rows_of(parameter, suffix);
      if (parameter.total_rows > 0 && total == 0 && parameter.first_row > 0) continue;
      parts.push_back({parameter.name + suffix, tensor, first, total,
                       sharded_                   ? checkpoint::Copies::nowhere
                       : parameter.total_rows > 0 ? checkpoint::Copies::data_group
                                                  : checkpoint::Copies::everywhere});
    }
  }
  parts.push_back({"steps", at::scalar_tensor(steps_, at::kLong)});
  return parts;
}

void AdamW::load_state(const io::TensorMap& state) {
  at::NoGradGuard no_grad;
  std::set<std::string> known = {"steps"};
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto& name = registry_.all()[i].name;
    const bool is_8bit = slots_[i].is_8bit;
    MOEGRAFT_CHECK(!state.contains(name + (is_8bit ? ".exp_avg" : ".exp_avg.codes")), "the checkpoint's moments of ",
                   name, " are ", is_8bit ? "float32" : "in 8 bits", ", this run's are ",
                   is_8bit ? "in 8 bits" : "float32", ": keep train.optimizer: ", is_8bit ? "adamw" : "adamw_8bit",
                   ", as it was");
    for (const char* suffix : is_8bit ? std::vector{".exp_avg.codes", ".exp_avg.scales", ".exp_avg_sq_root.codes",
                                                    ".exp_avg_sq_root.scales", ".step"}
                                      : std::vector{".exp_avg", ".exp_avg_sq", ".step"})
      known.insert(name + suffix);
  }
  checkpoint::check_nothing_left(state, known);
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto& parameter = registry_.all()[i];
    for (const auto& [suffix, tensor] : slots_[i].tensors()) {
      const auto [first, total] = rows_of(parameter, suffix);
      checkpoint::restore_tensor(tensor, state, parameter.name + suffix, first, total);
    }
  }
  const auto steps = at::scalar_tensor(0, at::kLong);
  checkpoint::restore_tensor(steps, state, "steps");
  steps_ = steps.item<int64_t>();
}

int64_t AdamW::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& slot : slots_)
    for (const auto& [suffix, tensor] : slot.tensors()) bytes += int64_t(tensor.nbytes());
  return bytes;
}

}  // namespace moegraft::train
