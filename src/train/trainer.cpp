#include "moegraft/train/trainer.h"

#include "libtorch.h"

#include <chrono>
#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/data/prefetch.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/device.h"
#include "moegraft/routing/stats.h"
#include "moegraft/run/run_dir.h"
#include "moegraft/train/memory_plan.h"
#include "moegraft/train/optimizer.h"
#include "moegraft/train/schedule.h"
#include "moegraft/train/signals.h"
#include "moegraft/train/tensorboard.h"
#include "samples.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::vector<std::string> modality_names(const model::Vocabulary& vocabulary) {
  std::vector<std::string> names{"text"};
  for (const auto& m : vocabulary.modalities) names.push_back(m.name);
  return names;
}

AdamW make_optimizer(model::ParameterRegistry& registry, const run::TrainSection& t) {
  const auto options = [](const run::OptimizerGroup& g) { return GroupOptions{g.lr, g.weight_decay}; };
  return AdamW(registry, {{"lora", options(t.lora)}, {"embeddings", options(t.embeddings)}, {"base", options(t.base)}}, {t.betas[0], t.betas[1], t.adam_epsilon, t.optimizer == "adamw_8bit"});
}

// One run: what happens when, around one step().
class Trainer {
 public:
  Trainer(const run::RunConfig& config, graft::GraftedModel model, run::RunDir dir, const std::optional<checkpoint::Checkpoint>& from, const MemoryPlan& plan)
      : config_(config),
        recompute_layers_(plan.recompute_layers),
        model_(std::move(model)),
        dir_(std::move(dir)),
        optimizer_(make_optimizer(*model_.registry, config.train)),
        schedule_{config.train.schedule, config.train.warmup, config.train.steps, config.train.min_lr_ratio},
        stream_(std::make_unique<data::BatchStream>(config.data.train, config.data, model_.vocabulary, uint64_t(config.run.seed), data::Share{config.train.accumulation}),
                config.data.prefetch, model_.device().is_cuda()),
        writer_(dir_.checkpoints(), config.checkpoint),
        board_(dir_.tensorboard(), from ? from->step : -1),
        routing_(model_.decoder->spec().num_layers, std::max<int64_t>(model_.decoder->spec().num_experts, 1), modality_names(model_.vocabulary), model_.device()) {
    state_.seed = config.run.seed;
    state_.environment = run::describe_environment(model_.device().str());
    if (!config.data.eval.empty()) eval_.emplace(config.data.eval, config.data, model_.vocabulary, config.train.eval_tokens);
    if (from) restore(*from);
  }

  TrainOutcome run() {
    StopSignals signals;
    const auto& t = config_.train;
    Progress progress("train", t.steps);
    progress.start_at(state_.step);
    session_start_ = Clock::now();
    earlier_seconds_ = window_start_ = state_.seconds;
    first_tokens_ = state_.tokens_seen;
    if (state_.step == 0) {
      if (eval_) log_evaluation();
      save();  // what the initialisation made: it is never computed twice
    }
    bool saved = true;
    while (state_.step < t.steps) {
      if (signals.requested()) {
        if (!saved) save();
        writer_.wait();
        progress.finish();
        log::warning("stopped by ", signal_name(signals.received()), " after step ", state_.step, "; saved. --resume auto continues.");
        return {state_.step, loss_, true};
      }
      if (t.max_minutes > 0 && seconds() > 60 * t.max_minutes) {
        log::info("train.max_minutes (", t.max_minutes, ") reached after step ", state_.step);
        break;
      }
      step();
      saved = false;
      progress.update(state_.step, status());
      const bool last = state_.step == t.steps;
      if (state_.step % t.log_every == 0 || last) log_metrics();
      if (state_.step % config_.routing.every == 0 || last) log_routing();
      measure_.reset();
      if (eval_ && ((t.eval_every > 0 && state_.step % t.eval_every == 0) || last)) log_evaluation();
      if (t.sample_every > 0 && state_.step % t.sample_every == 0 && !last) draw_samples();
      if (state_.step % config_.checkpoint.every == 0) {
        save();
        saved = true;
      }
    }
    if (!saved) {
      if (eval_ && !measure_) log_evaluation();
      save();
    }
    writer_.wait();
    progress.finish();
    draw_samples();
    if (model_.decoder->base().weights->trainable()) export_base();
    return {state_.step, loss_, false};
  }

 private:
  void restore(const checkpoint::Checkpoint& from) {
    optimizer_.load_state(from.optimizer);
    const auto environment = std::move(state_.environment);
    state_ = checkpoint::state_from_json(from.state);
    for (const auto& line : checkpoint::environment_differences(state_.environment, environment))
      log::warning("resuming on another environment, so the result is not bit-identical to an uninterrupted run: ", line);
    state_.environment = environment;
    stream_.restore(state_.data_cursor);
    writer_.discard_after(from.step);
  }

  double seconds() const { return earlier_seconds_ + seconds_since(session_start_); }

  data::StepBatch next_step() {
    const auto start = Clock::now();
    data::StepBatch step = stream_.next();
    for (auto& batch : step.micro_batches) batch = model::to_device(batch, model_.device());
    window_wait_ += seconds_since(start);
    return step;
  }

  void step() {
    const auto start = Clock::now();
    const auto& t = config_.train;
    model_.registry->zero_grad();
    const data::StepBatch step_batch = next_step();
    const auto& batches = step_batch.micro_batches;
    const int64_t labels = step_batch.num_labels, tokens = step_batch.num_tokens;
    const bool balance = model_.decoder->base().weights->trainable() && model_.decoder->spec().router_aux_loss_coef > 0;
    model::ForwardOptions options;
    options.routing = &routing_;
    options.aux_loss = balance;
    options.recompute_layers = recompute_layers_;
    std::vector<model::LossResult> results;
    for (const auto& batch : batches) {
      const auto result = model_.decoder->forward(batch, options);
      auto ce = model::cross_entropy_loss(*model_.decoder, result, batch, double(std::max<int64_t>(labels, 1)));
      const at::Tensor objective = balance ? ce.loss + result.aux_loss * (model_.decoder->spec().router_aux_loss_coef / double(batches.size())) : ce.loss;
      if (objective.requires_grad()) objective.backward();
      ce.loss = ce.loss.detach();
      results.push_back(std::move(ce));
    }
    // Read only now: the host would wait for the device here, and has nothing left to launch.
    double loss = 0;
    for (size_t i = 0; i < results.size(); ++i) {
      loss += results[i].loss.item<double>();
      if (!std::isfinite(loss)) stop_on_bad_number(batches[i], "loss", loss);
      add(results[i]);
    }
    const double norm = global_grad_norm(*model_.registry);
    if (!std::isfinite(norm)) stop_on_bad_number(batches.back(), "gradient norm", norm);
    optimizer_.step(schedule_.factor(state_.step), clip_factor(norm, t.clip));
    loss_ = loss;
    grad_norm_ = norm;
    window_tokens_ += tokens;
    state_.tokens_seen += tokens;
    ++state_.step;
    window_step_ += seconds_since(start);
  }

  void add(const model::LossResult& ce) {
    const at::Tensor sums = ce.nll_sum_M.to(at::kCPU);
    window_nll_.resize(ce.count_M.size(), 0.0);
    window_labels_.resize(ce.count_M.size(), 0);
    for (size_t m = 0; m < ce.count_M.size(); ++m) window_nll_[m] += sums[int64_t(m)].item<double>(), window_labels_[m] += ce.count_M[m];
  }

  [[noreturn]] void stop_on_bad_number(const model::PackedBatch& batch, const char* what, double value) {
    const fs::path file = dir_.path() / ("bad-batch-step-" + std::to_string(state_.step) + ".safetensors");
    io::TensorMap tensors{{"ids", batch.ids_T.to(at::kCPU)}, {"labels", batch.labels_T.to(at::kCPU)}, {"positions", batch.positions_T.to(at::kCPU)}, {"cu_seqlens", at::tensor(batch.cu_seqlens)}};
    if (batch.modality_T.defined()) tensors["modality"] = batch.modality_T.to(at::kCPU);
    io::save_safetensors(file, tensors);
    fail<UserError>("the ", what, " is ", value, " at step ", state_.step, "; the batch is saved in ", file.string(), ". Lower the learning rate or train.clip and resume from the last checkpoint.");
  }

  std::string status() {
    const double elapsed = seconds_since(session_start_);
    char buffer[96];
    std::snprintf(buffer, sizeof buffer, "loss %.4f · %s tok/s", loss_, format_count(double(state_.tokens_seen - first_tokens_) / std::max(elapsed, 1e-9)).c_str());
    return buffer;
  }

  void log_metrics() {
    const auto names = modality_names(model_.vocabulary);
    const double now = seconds(), factor = schedule_.factor(state_.step - 1);
    io::Json line{{"step", state_.step}, {"loss", loss_}, {"grad_norm", grad_norm_}, {"tokens", state_.tokens_seen}, {"epochs", stream_.epochs()}, {"lr_factor", factor}};
    for (size_t m = 0; m < window_nll_.size(); ++m)
      if (window_labels_[m] > 0) {
        line["nll_" + names[m]] = window_nll_[m] / double(window_labels_[m]);
        board_.scalar("train/nll_" + names[m], state_.step, window_nll_[m] / double(window_labels_[m]));
      }
    const double rate = double(window_tokens_) / std::max(now - window_start_, 1e-9);
    // Of the time in steps: what passed until their batches were there.
    const double data_wait_share = window_step_ > 0 ? window_wait_ / window_step_ : 0;
    line["tokens_per_s"] = rate;
    line["data_wait_share"] = data_wait_share;
    line["seconds"] = now;
    dir_.metrics.append(line.dump());
    board_.scalar("train/loss", state_.step, loss_);
    board_.scalar("train/grad_norm", state_.step, grad_norm_);
    board_.scalar("train/lr_factor", state_.step, factor);
    board_.scalar("train/tokens_per_s", state_.step, rate);
    board_.scalar("train/data_wait_share", state_.step, data_wait_share);
    window_nll_.clear();
    window_labels_.clear();
    window_tokens_ = 0;
    window_wait_ = window_step_ = 0;
    window_start_ = now;
  }

  void log_routing() {
    const auto report = routing_.read();
    dir_.routing.append(routing::to_json_line(report, state_.step));
    for (const auto& [tag, value] : routing::scalars(report)) board_.scalar(tag, state_.step, value);
    routing_.reset();
  }

  void log_evaluation() {
    const auto names = modality_names(model_.vocabulary);
    const auto result = evaluate::measure_likelihood(model_, *eval_);
    io::Json line{{"step", state_.step}, {"eval", true}};
    for (size_t m = 0; m < result.nll_M.size(); ++m)
      if (result.labels_M[m] > 0) {
        line["eval_nll_" + names[m]] = result.nll_M[m];
        board_.scalar("eval/nll_" + names[m], state_.step, result.nll_M[m]);
      }
    dir_.metrics.append(line.dump());
    // The measure that `best` means: likelihood of what is being learnt.
    measure_ = result.total();
    if (!state_.best_measure || *measure_ < *state_.best_measure) state_.best_measure = measure_, state_.best_step = state_.step;
    log::info("step ", state_.step, ": held-out ", line.dump());
  }

  void draw_samples() {
    if (config_.train.sample_prompts.empty() || !model_.is_graft()) return;
    const fs::path file = write_samples(model_, config_.train.sample_prompts, dir_.samples(), state_.step, uint64_t(config_.run.seed));
    if (!file.empty()) board_.image_file("samples", state_.step, file);
  }

  void save() {
    state_.seconds = seconds();
    state_.data_cursor = stream_.state();
    dir_.metrics.sync();
    dir_.routing.sync();
    writer_.save(state_.step, checkpoint::parameter_parts(*model_.registry), optimizer_.state_parts(), checkpoint::to_json(state_), measure_);
  }

  void export_base() {
    const fs::path to = dir_.path() / "model";
    model::save_base(model_.decoder->base(), to, at::kFloat);
    for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}) {
      const fs::path from = fs::path(config_.model.init ? config_.model.init->tokenizer : config_.model.path) / name;
      if (fs::exists(from)) io::write_file_atomic(to / name, io::read_file(from));
    }
    log::info("wrote ", to.string(), ": a Hugging Face model");
  }

  run::RunConfig config_;
  int64_t recompute_layers_;
  graft::GraftedModel model_;
  run::RunDir dir_;
  AdamW optimizer_;
  Schedule schedule_;
  data::PrefetchStream stream_;
  std::optional<data::EvalStream> eval_;
  checkpoint::CheckpointWriter writer_;
  TensorBoard board_;
  routing::RoutingStats routing_;
  checkpoint::TrainState state_;
  std::optional<double> measure_;
  double loss_ = 0, grad_norm_ = 0;
  std::vector<double> window_nll_;
  std::vector<int64_t> window_labels_;
  int64_t window_tokens_ = 0, first_tokens_ = 0;  // first: seen before this session
  double window_wait_ = 0, window_step_ = 0;      // seconds waiting for batches, seconds in steps
  double window_start_ = 0, earlier_seconds_ = 0;
  Clock::time_point session_start_;
};

void describe(const graft::GraftedModel& m) {
  const auto& s = m.decoder->spec();
  const double trained = double(m.registry->num_elements()), base = double(s.num_parameters());
  const bool full = m.decoder->base().weights->trainable();
  log::info(s.family, ": ", format_count(base), " parameters, ", format_count(double(s.num_active_parameters())), " active per token; training ", format_count(trained), " (",
            full ? 100.0 : std::round(1000 * trained / (base + trained)) / 10, " %)");
}

}  // namespace

void resolve_paths(run::RunConfig& config) {
  const auto absolute = [](std::string& path) {
    if (!path.empty()) path = fs::absolute(path).lexically_normal().string();
  };
  absolute(config.run.dir);
  absolute(config.model.path);
  if (config.model.init) absolute(config.model.init->tokenizer);
  for (auto& [name, modality] : config.modalities) absolute(modality.codec);
  for (auto& adapter : config.adapters) absolute(adapter.init_from);
  for (auto* sources : {&config.data.train, &config.data.eval})
    for (auto& source : *sources) absolute(source.path);
}

TrainOutcome train(const run::RunConfig& config_in, const std::string& resume) {
  run::RunConfig config = config_in;
  resolve_paths(config);
  std::optional<checkpoint::Checkpoint> from;
  const bool exists = run::is_run(config.run.dir);
  if (resume == "auto") {
    if (exists)
      if (const auto latest = checkpoint::find_latest(fs::path(config.run.dir) / "checkpoints")) from = checkpoint::load(*latest);
  } else if (resume != "none") {
    MOEGRAFT_CHECK_USAGE(exists, "--resume ", resume, ": ", config.run.dir, " is no run yet");
    from = checkpoint::load(resume);
  }
  const at::Device planned_on = graft::parse_device(config.model.device);
  const std::string device = planned_on.str();
  // Before anything is loaded or made, and so without the new rows, whose number the codecs know.
  if (!config.model.path.empty()) check_fits(plan_memory(memory_request(model::read_spec(config.model.path), config, {}, planned_on)));
  const bool again = exists && resume != "none";
  run::RunDir dir = again ? run::RunDir::resume(config, from ? from->step : 0, device) : run::RunDir::create(config, device);
  graft::GraftedModel model = from ? graft::assemble_model(config) : graft::build_model(config);
  if (from) {
    checkpoint::load_parameters(*model.registry, from->parameters);
    log::info("resuming ", config.run.dir, " after step ", from->step);
  } else if (!model.vocabulary.modalities.empty()) {
    graft::write_vocabulary(dir.path(), model.vocabulary);
    io::write_file_atomic(dir.path() / "init.json", model.init_report_json + "\n");
  }
  describe(model);
  const MemoryPlan plan = plan_memory(memory_request(model.decoder->spec(), config, model.vocabulary, model.device()));
  check_fits(plan);
  log::info(summary(plan));
  return Trainer(config, std::move(model), std::move(dir), from, plan).run();
}

}  // namespace moegraft::train
