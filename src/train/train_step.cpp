#include "train_step.h"

#include "libtorch.h"

#include <algorithm>
#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/device.h"

namespace moegraft::train {

TrainStep::TrainStep(Stage& stage, const run::RunConfig& config, int64_t recompute_layers)
    : stage_(stage),
      clip_(config.train.clip),
      routing_(stage.model.decoder->spec().num_layers, stage.model.decoder->spec().num_experts, stage.modality_names,
               stage.model.device()),
      prefix_cache_(config.train.prefix_cache_mib << 20) {
  const auto& decoder = *stage.model.decoder;
  balances_ =
      decoder.base().weights->trainable() && decoder.spec().has_experts() && decoder.spec().router_aux_loss_coef > 0;
  forward_.recompute_layers = recompute_layers;
  forward_.lockstep = stage.distributed.lockstep();
  if (config.train.prefix_cache_mib > 0) forward_.prefix_cache = &prefix_cache_;
}

StepResult TrainStep::run(const Session& session, bool look_for_idle_groups) {
  const auto start = std::chrono::steady_clock::now();
  const bool stop = session.asked_to_stop();
  const int64_t step = session.state().step;
  DistributedStep& distributed = stage_.distributed;
  StepResult out;
  distributed.heartbeat(step);
  distributed.take_traffic(stage_.model.sharded.get());  // of evaluation and samples: not the step's
  distributed.begin_step();
  const data::StepBatch batch = next_batch(out);
  const auto results = run_batches(batch);
  distributed.finish_backward();
  if (distributed.alone() && look_for_idle_groups) out.idle_groups = idle_groups();
  // Read only now, in one copy: the host waits for the device here, and has nothing left to launch.
  const Numbers numbers = read_numbers(results, distributed.queue_grad_squares());
  share_numbers(session, batch.micro_batches, results, numbers, stop, out);
  out.grad_norm = distributed.grad_norm(numbers.grad_squares);
  if (!std::isfinite(out.grad_norm))
    stop_on_bad_number(session, &batch.micro_batches.back(), "gradient norm", out.grad_norm);
  stage_.optimizer.step(stage_.schedule.factor(step), clip_factor(out.grad_norm, clip_));
  distributed.share_updates();
  out.tokens = batch.num_tokens;
  out.seconds = seconds_since(start);
  out.traffic = distributed.take_traffic(stage_.model.sharded.get());
  return out;
}

data::StepBatch TrainStep::next_batch(StepResult& out) {
  const auto start = std::chrono::steady_clock::now();
  data::StepBatch step = stage_.stream.next();
  for (auto& batch : step.micro_batches) batch = model::to_device(batch, stage_.model.device());
  out.wait_seconds = seconds_since(start);
  return step;
}

// Gradients of the whole step's loss: each micro-batch is divided by the labels of all of them, in all processes.
std::vector<model::LossResult> TrainStep::run_batches(const data::StepBatch& step) {
  const auto& batches = step.micro_batches;
  const auto& decoder = *stage_.model.decoder;
  const double labels = double(std::max<int64_t>(step.num_labels, 1));
  // Of the whole step: auxiliary losses are means over them.
  const double passes = double(int64_t(batches.size()) * stage_.distributed.size());
  const double balance = decoder.spec().router_aux_loss_coef / passes;
  std::vector<model::LossResult> results;
  for (size_t i = 0; i < batches.size(); ++i) {
    const bool placeholder = batches[i].facts->placeholder;
    forward_.routing = placeholder ? nullptr : &routing_;
    forward_.aux_loss = balances_ && !placeholder;
    forward_.adapter_loss = !placeholder;
    const auto result = stage_.model.decoder->forward(batches[i], forward_);
    auto ce = model::cross_entropy_loss(decoder, result, batches[i], labels);
    at::Tensor objective = forward_.aux_loss ? ce.loss + result.aux_loss * balance : ce.loss;
    if (result.adapter_loss.defined()) objective = objective + result.adapter_loss / passes;
    if (i + 1 == batches.size()) stage_.distributed.last_backward();
    if (objective.requires_grad()) objective.backward();
    ce.loss = ce.loss.detach();
    results.push_back(std::move(ce));
  }
  return results;
}

// Whether a tensor has a gradient is known without asking the device.
std::set<std::string> TrainStep::idle_groups() const {
  std::set<std::string> groups;
  for (const auto& p : stage_.model.registry->all()) groups.insert(p.group);
  for (const auto& p : stage_.model.registry->all())
    if (p.tensor.grad().defined()) groups.erase(p.group);
  return groups;
}

// squares_2: undefined where no gradient is on a device.
TrainStep::Numbers TrainStep::read_numbers(const std::vector<model::LossResult>& results, const at::Tensor& squares_2) {
  std::vector<at::Tensor> parts;
  for (const auto& r : results) parts.push_back(r.loss.reshape({1})), parts.push_back(r.nll_sum_M);
  at::Tensor all = at::cat(parts).to(at::kDouble);
  if (squares_2.defined()) all = at::cat({all, squares_2});
  all = all.to(at::kCPU);
  const double* next = all.const_data_ptr<double>();
  Numbers numbers;
  for (const auto& r : results) {
    numbers.losses.push_back(*next++);
    numbers.nll_sums.emplace_back(next, next + r.nll_sum_M.size(0));
    next += r.nll_sum_M.size(0);
  }
  if (squares_2.defined()) numbers.grad_squares = {next[0], next[1]};
  return numbers;
}

// Loss, sums by modality and whether to stop, over all processes in one exchange.
void TrainStep::share_numbers(const Session& session, const std::vector<model::PackedBatch>& batches,
                              const std::vector<model::LossResult>& results, const Numbers& numbers, bool stop,
                              StepResult& out) {
  const size_t sets = results.front().count_M.size(), first = 3;
  std::vector<double> mine(first + 3 * sets, 0.0);  // loss, stop, time is up, then nll, labels and tokens by modality
  mine[1] = stop;
  mine[2] = session.time_is_up();
  const model::PackedBatch* bad = nullptr;
  for (size_t i = 0; i < results.size(); ++i) {
    mine[0] += numbers.losses[i];
    if (!bad && !std::isfinite(mine[0])) bad = &batches[i];
    for (size_t m = 0; m < sets; ++m) {
      mine[first + m] += numbers.nll_sums[i][m];
      mine[first + sets + m] += double(results[i].count_M[m]);
      const auto& tokens = batches[i].facts->modality_tokens;
      if (!batches[i].facts->placeholder && m < tokens.size()) mine[first + 2 * sets + m] += double(tokens[m].size(0));
    }
  }
  const auto all = stage_.distributed.sum(mine, "losses");
  out.loss = all[0];
  out.stop = all[1] > 0;
  out.time_is_up = all[2] > 0;
  if (!std::isfinite(out.loss)) stop_on_bad_number(session, bad, "loss", out.loss);
  std::set<int64_t> present;
  for (size_t m = 0; m < sets; ++m) {
    out.nll_M.push_back(all[first + m]);
    out.labels_M.push_back(int64_t(all[first + sets + m]));
    if (all[first + 2 * sets + m] > 0) present.insert(int64_t(m));
  }
  stage_.distributed.forget_absent(present);
}

// batch: where it came from; null when it was another process's.
void TrainStep::stop_on_bad_number(const Session& session, const model::PackedBatch* batch, const char* what,
                                   double value) const {
  const int64_t step = session.state().step;
  std::string saved = "the batch is saved by the process that had it";
  if (batch) {
    const std::string rank = stage_.distributed.alone() ? "" : "-rank-" + std::to_string(stage_.distributed.rank());
    const std::filesystem::path file =
        session.dir() / ("bad-batch-step-" + std::to_string(step) + rank + ".safetensors");
    io::TensorMap tensors{{"ids", batch->ids_T.to(at::kCPU)},
                          {"labels", batch->labels_T.to(at::kCPU)},
                          {"positions", batch->positions_T.to(at::kCPU)},
                          {"cu_seqlens", at::tensor(batch->cu_seqlens)}};
    if (batch->modality_T.defined()) tensors["modality"] = batch->modality_T.to(at::kCPU);
    io::save_safetensors(file, tensors);
    saved = "the batch is saved in " + file.string();
  }
  fail<UserError>("the ", what, " is ", value, " at step ", step, "; ", saved,
                  ". Lower the learning rate or train.clip and resume from the last checkpoint.");
}

routing::RoutingReport TrainStep::take_routing() {
  stage_.distributed.sum_in_place(routing_.sums(), "routing statistics");
  auto report = routing_.read();
  routing_.reset();
  return report;
}

}  // namespace moegraft::train
