#include "moegraft/train/trainer.h"

#include "libtorch.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <set>
#include <utility>

#include "health.h"
#include "journal.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/data/prefetch.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/io/files.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/device.h"
#include "moegraft/run/records.h"
#include "moegraft/train/schedule.h"
#include "moegraft/train/signals.h"
#include "moegraft/train/team.h"
#include "samples.h"
#include "startup.h"

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

// One run: what happens when, around one step().
class Trainer {
 public:
  Trainer(const run::RunConfig& config, Start start, const distributed::Mesh& mesh)
      : config_(config),
        run_path_(config.run.dir),
        model_(std::move(start.model)),
        names_(modality_names(model_.vocabulary)),
        team_(config.parallel, mesh, *model_.registry, graft::parse_dtype(config.train.gradients)),
        optimizer_(make_optimizer(*model_.registry, config.train, team_.owned())),
        schedule_{config.train.schedule, config.train.warmup, config.train.steps, config.train.min_lr_ratio},
        stream_(std::make_unique<data::BatchStream>(config.data.train, config.data, model_.vocabulary, uint64_t(config.run.seed),
                                                    data::Share{config.train.accumulation, team_.rank(), team_.size()}),
                config.data.prefetch, model_.device().is_cuda()),
        journal_(std::move(start.dir), start.from ? start.from->step : -1),
        writer_(run_path_ / "checkpoints", config.checkpoint, true,
                mesh.distributed() ? checkpoint::peers_of(mesh.world, std::chrono::milliseconds(int64_t(1000 * config.parallel.timeout_seconds))) : checkpoint::Peers()),
        routing_(model_.decoder->spec().num_layers, model_.decoder->spec().num_experts, names_, model_.device()) {
    state_.seed = config.run.seed;
    state_.environment = run::describe_environment(model_.device().str());
    state_.environment["layout"] = team_.layout();
    state_.fingerprints = start.fingerprints;
    balances_ = model_.decoder->base().weights->trainable() && model_.decoder->spec().has_experts() && model_.decoder->spec().router_aux_loss_coef > 0;
    forward_.recompute_layers = start.plan.recompute_layers;
    forward_.lockstep = team_.lockstep();
    if (config.train.prefix_cache_mib > 0) forward_.prefix_cache = &prefix_cache_;
    if (!config.data.eval.empty()) eval_.emplace(config.data.eval, config.data, model_.vocabulary, config.train.eval_tokens, data::Share{1, team_.rank(), team_.size()});
    if (start.from) restore(*start.from);
    journal_.note_trainable(start.trained);
  }

  TrainOutcome run() {
    const bool early = ended_early();
    if (state_.step > 0 && (state_.step >= config_.train.steps || early)) {
      const std::string why = early ? detail::concat("train.early_stopping_patience ", config_.train.early_stopping_patience) : detail::concat("train.steps ", config_.train.steps);
      log::info("the run has ended before, after step ", state_.step, " (", why, "): nothing to do; raise it to go on");
      return {state_.step, state_.last_loss, false, true};
    }
    first_step_ = state_.step;
    check_start();
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
      if (stop_asked_) {
        if (!saved) save();
        writer_.wait();
        progress.finish();
        log::warning("stopped by ", signals.requested() ? signal_name(signals.received()) : "a signal to another process", " after step ", state_.step, "; saved. --resume auto continues.");
        return {state_.step, loss_, true};
      }
      if (ended_early()) {
        log::info("train.early_stopping_patience: ended after step ", state_.step, ", for data.eval was best at step ", state_.best_step, " (", *state_.best_measure, "): --checkpoint best reads that one",
                  model_.decoder->base().weights->trainable() ? detail::concat("; ", (run_path_ / "model").string(), " is the last") : "");
        break;
      }
      if (time_is_up_) {
        log::info("train.max_minutes (", t.max_minutes, ") reached after step ", state_.step);
        break;
      }
      step(signals.requested());
      saved = false;
      progress.update(state_.step, status());
      const bool last = state_.step == t.steps;
      check_step(last);
      if (state_.step % t.log_every == 0 || last) log_metrics();
      if (state_.step % config_.routing.every == 0 || last) log_routing(last);
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
  // As many evaluations in a row as train.early_stopping_patience without a lower loss.
  bool ended_early() const {
    const auto& t = config_.train;
    return t.early_stopping_patience > 0 && t.eval_every > 0 && state_.best_step >= 0 && state_.step - state_.best_step >= t.early_stopping_patience * t.eval_every;
  }

  void restore(const checkpoint::Checkpoint& from) {
    optimizer_.load_state(from.optimizer);
    const auto environment = std::move(state_.environment), fingerprints = std::move(state_.fingerprints);
    state_ = checkpoint::state_from_json(from.state);
    if (state_.step > 0)
      for (const auto& line : checkpoint::environment_differences(state_.environment, environment))
        log::warning("resuming on another environment, so the result is not bit-identical to an uninterrupted run: ", line);
    const bool other_data = std::any_of(fingerprints.begin(), fingerprints.end(), [&](const auto& now) {
      const auto was = state_.fingerprints.find(now.first);
      return now.first.starts_with("data.train") && was != state_.fingerprints.end() && was->second != now.second;
    });
    state_.environment = environment, state_.fingerprints = fingerprints;
    try {
      stream_.restore(state_.data_cursor);
    } catch (const UserError& e) {
      if (!other_data) throw;  // that it is other data was accepted (--accept-changed data)
      log::warning("data.train is read from its beginning: ", e.what());
    }
    writer_.set_aside_after(from.step);
  }

  double seconds() const { return earlier_seconds_ + seconds_since(session_start_); }

  data::StepBatch next_step() {
    const auto start = Clock::now();
    data::StepBatch step = stream_.next();
    for (auto& batch : step.micro_batches) batch = model::to_device(batch, model_.device());
    window_wait_ += seconds_since(start);
    return step;
  }

  // stop: this process was asked to.
  void step(bool stop) {
    const auto start = Clock::now();
    const auto& t = config_.train;
    team_.beat(state_.step);
    team_.take_traffic(model_.sharded.get());  // of evaluation and samples: not the step's
    team_.begin_step();
    const data::StepBatch step_batch = next_step();
    const auto& batches = step_batch.micro_batches;
    const double labels = double(std::max<int64_t>(step_batch.num_labels, 1));
    const double balance = model_.decoder->spec().router_aux_loss_coef / double(int64_t(batches.size()) * team_.size());
    std::vector<model::LossResult> results;
    for (size_t i = 0; i < batches.size(); ++i) {
      const bool placeholder = batches[i].facts->placeholder;
      forward_.routing = placeholder ? nullptr : &routing_;
      forward_.aux_loss = balances_ && !placeholder;
      const auto result = model_.decoder->forward(batches[i], forward_);
      auto ce = model::cross_entropy_loss(*model_.decoder, result, batches[i], labels);
      const at::Tensor objective = forward_.aux_loss ? ce.loss + result.aux_loss * balance : ce.loss;
      if (i + 1 == batches.size()) team_.last_backward();
      if (objective.requires_grad()) objective.backward();
      ce.loss = ce.loss.detach();
      results.push_back(std::move(ce));
    }
    team_.finish_backward();
    if (team_.alone() && health_.watches_groups()) note_idle_groups();
    // Read only now, in one copy: the host waits for the device here, and has nothing left to launch.
    const StepNumbers numbers = read_numbers(results, team_.queue_grad_squares());
    loss_ = share_numbers(batches, results, numbers, stop);
    grad_norm_ = team_.grad_norm(numbers.grad_squares);
    if (!std::isfinite(grad_norm_)) stop_on_bad_number(&batches.back(), "gradient norm", grad_norm_);
    optimizer_.step(schedule_.factor(state_.step), clip_factor(grad_norm_, t.clip));
    team_.share_updates();
    window_tokens_ += step_batch.num_tokens;
    state_.tokens_seen += step_batch.num_tokens;
    ++state_.step;
    window_step_ += seconds_since(start);
    for (const auto& [purpose, traffic] : team_.take_traffic(model_.sharded.get())) {
      window_exchange_ += traffic.wait_seconds;
      window_bytes_ += traffic.bytes;
    }
    ++window_steps_;
  }

  // Groups of which no tensor has a gradient: whether there is one is known without asking the device.
  void note_idle_groups() {
    idle_groups_.clear();
    for (const auto& p : model_.registry->all()) idle_groups_.insert(p.group);
    for (const auto& p : model_.registry->all())
      if (p.tensor.grad().defined()) idle_groups_.erase(p.group);
  }

  struct StepNumbers {
    std::vector<double> losses;                // of each micro-batch
    std::vector<std::vector<double>> nll_sums;  // its sums by modality
    std::array<double, 2> grad_squares{};      // of what is on a device
  };
  // squares_2: undefined where no gradient is on a device.
  static StepNumbers read_numbers(const std::vector<model::LossResult>& results, const at::Tensor& squares_2) {
    std::vector<at::Tensor> parts;
    for (const auto& r : results) parts.push_back(r.loss.reshape({1})), parts.push_back(r.nll_sum_M);
    at::Tensor all = at::cat(parts).to(at::kDouble);
    if (squares_2.defined()) all = at::cat({all, squares_2});
    all = all.to(at::kCPU);
    const double* next = all.const_data_ptr<double>();
    StepNumbers numbers;
    for (const auto& r : results) {
      numbers.losses.push_back(*next++);
      numbers.nll_sums.emplace_back(next, next + r.nll_sum_M.size(0));
      next += r.nll_sum_M.size(0);
    }
    if (squares_2.defined()) numbers.grad_squares = {next[0], next[1]};
    return numbers;
  }

  // The loss over all processes; the sums by modality go into the window. All leave after the same step: when one was asked to, or its time is up.
  double share_numbers(const std::vector<model::PackedBatch>& batches, const std::vector<model::LossResult>& results, const StepNumbers& numbers, bool stop) {
    const size_t sets = results.front().count_M.size(), first = 3;
    const double minutes = config_.train.max_minutes;
    std::vector<double> mine(first + 3 * sets, 0.0);  // loss, stop, time is up, then nll, labels and tokens by modality
    mine[1] = stop;
    mine[2] = minutes > 0 && seconds() > 60 * minutes;
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
    const auto all = team_.sum(mine, "losses");
    stop_asked_ = all[1] > 0;
    time_is_up_ = all[2] > 0;
    if (!std::isfinite(all[0])) stop_on_bad_number(bad, "loss", all[0]);
    std::set<int64_t> present;  // modality m is number m of names_
    for (size_t m = 0; m < sets; ++m)
      if (all[first + 2 * sets + m] > 0) present.insert(int64_t(m));
    team_.forget_absent(present);
    window_nll_.resize(sets, 0.0);
    window_labels_.resize(sets, 0);
    labels_M_.assign(sets, 0);
    for (size_t m = 0; m < sets; ++m) labels_M_[m] = int64_t(all[first + sets + m]);
    for (size_t m = 0; m < sets; ++m) window_nll_[m] += all[first + m], window_labels_[m] += int64_t(all[first + sets + m]);
    return all[0];
  }

  // batch: where it came from; null when it was another process's.
  [[noreturn]] void stop_on_bad_number(const model::PackedBatch* batch, const char* what, double value) {
    std::string saved = "the batch is saved by the process that had it";
    if (batch) {
      const std::string rank = team_.alone() ? "" : "-rank-" + std::to_string(team_.rank());
      const fs::path file = run_path_ / ("bad-batch-step-" + std::to_string(state_.step) + rank + ".safetensors");
      io::TensorMap tensors{{"ids", batch->ids_T.to(at::kCPU)}, {"labels", batch->labels_T.to(at::kCPU)}, {"positions", batch->positions_T.to(at::kCPU)}, {"cu_seqlens", at::tensor(batch->cu_seqlens)}};
      if (batch->modality_T.defined()) tensors["modality"] = batch->modality_T.to(at::kCPU);
      io::save_safetensors(file, tensors);
      saved = "the batch is saved in " + file.string();
    }
    fail<UserError>("the ", what, " is ", value, " at step ", state_.step, "; ", saved, ". Lower the learning rate or train.clip and resume from the last checkpoint.");
  }

  std::string status() {
    const double elapsed = seconds_since(session_start_);
    char buffer[96];
    std::snprintf(buffer, sizeof buffer, "loss %.4f · %s tok/s", loss_, format_count(double(state_.tokens_seen - first_tokens_) / std::max(elapsed, 1e-9)).c_str());
    return buffer;
  }

  void log_metrics() {
    const double now = seconds();
    run::TrainingLine line;
    line.step = state_.step, line.tokens = state_.tokens_seen, line.epochs = stream_.epochs(), line.seconds = now;
    const auto counts = stream_.counts();
    line.truncated_documents = counts.truncated, line.skipped_documents = counts.skipped;
    line.loss = loss_, line.grad_norm = grad_norm_, line.lr_factor = schedule_.factor(state_.step - 1);
    for (size_t m = 0; m < window_nll_.size(); ++m)
      if (window_labels_[m] > 0) line.nll[names_[m]] = window_nll_[m] / double(window_labels_[m]);
    line.tokens_per_s = double(window_tokens_) / std::max(now - window_start_, 1e-9);
    line.data_wait_share = window_step_ > 0 ? window_wait_ / window_step_ : 0;
    line.checkpoint_stall_share = std::exchange(stall_share_, {});
    if (const auto use = prefix_cache_.take_use(); use.tokens > 0) line.prefix_cache_hit_share = double(use.found) / double(use.tokens);
    if (!team_.alone()) log_team(line);
    for (const auto& [name, value] : run::measures(line)) journal_.scalar("train/" + name, state_.step, value);
    journal_.metrics(run::to_json_line(line));
    window_nll_.clear();
    window_labels_.clear();
    window_tokens_ = window_steps_ = window_bytes_ = 0;
    window_wait_ = window_step_ = window_exchange_ = 0;
    window_start_ = now;
  }

  // What the exchange with the other processes takes, and whether one of them is slower: each one's step time without its waiting for the others.
  void log_team(run::TrainingLine& line) {
    const double steps = double(std::max<int64_t>(window_steps_, 1));
    const auto ranks = team_.gather({(window_step_ - window_exchange_) / steps, window_exchange_ / steps, double(window_bytes_) / steps}, "step times");
    std::vector<double> busy;
    double wait = 0, bytes = 0;
    for (const auto& rank : ranks) busy.push_back(rank[0]), wait += rank[1], bytes += rank[2];
    line.busy_seconds_by_rank = busy;
    line.comm_wait_share = window_step_ > 0 ? wait / double(ranks.size()) / (window_step_ / steps) : 0;
    line.comm_mib_per_step = bytes / double(1 << 20);
    std::vector<double> sorted = busy;
    std::sort(sorted.begin(), sorted.end());
    const double median = sorted[(sorted.size() - 1) / 2], slowest = sorted.back();
    if (slowest > 1.5 * median && slowest - median > 0.02 && state_.step >= next_straggler_warning_) {
      const auto rank = std::max_element(busy.begin(), busy.end()) - busy.begin();
      log::warning("rank ", rank, " is a straggler: ", slowest, " s of work a step, the median is ", median, " s");
      next_straggler_warning_ = state_.step + 20 * config_.train.log_every;
    }
  }

  void log_routing(bool last) {
    team_.sum_in_place(routing_.sums(), "routing statistics");
    const auto report = routing_.read();
    journal_.routing(report, state_.step);
    routing_.reset();
    act_on(health_.after_routing(report, state_.step, last));
  }

  // One line each, once; with train.strict the first ends the run.
  void act_on(const std::vector<Finding>& findings) {
    for (const auto& f : findings) {
      log::warning("step ", f.step, ": ", f.text);
      journal_.note_warning({f.step, f.check, f.text});
    }
    if (findings.empty() || !config_.train.strict) return;
    const bool stepped = state_.step > first_step_;
    if (stepped) save();
    writer_.wait();
    const std::string when = stepped ? detail::concat("after step ", state_.step, ", saved,") : "before its first step";
    fail<UserError>("train.strict: ended ", when, " by the warning above (", findings.front().check, ")");
  }

  void check_start() {
    StartFacts facts;
    facts.step = state_.step, facts.steps = config_.train.steps, facts.warmup = config_.train.warmup;
    facts.sequence_length = config_.data.sequence_length, facts.max_positions = model_.decoder->spec().max_positions;
    facts.trainable = model_.registry->num_elements();
    for (const auto& p : model_.registry->all()) facts.groups.insert(p.group);
    facts.learning_rates = {{"lora", config_.train.lora.lr}, {"embeddings", config_.train.embeddings.lr}, {"base", config_.train.base.lr}};
    facts.lr_before = state_.step > 0 ? state_.lr_factor : -1, facts.lr_now = schedule_.factor(state_.step);
    facts.lr_was_now = schedule_.factor(std::max<int64_t>(0, state_.step - 1));
    act_on(health_.at_start(facts));
  }

  void check_step(bool last) {
    StepFacts facts;
    facts.step = state_.step, facts.last = last, facts.loss = loss_, facts.grad_norm = grad_norm_;
    facts.labels_M = labels_M_, facts.idle_groups = idle_groups_;
    act_on(health_.after_step(facts));
  }

  void log_evaluation() {
    model::ForwardOptions options;
    options.lockstep = team_.lockstep();
    const auto result = evaluate::measure_likelihood(model_, *eval_, options, [this](const std::vector<double>& mine) { return team_.sum(mine, "evaluation"); });
    run::EvaluationLine line;
    line.step = state_.step;
    for (size_t m = 0; m < result.nll_M.size(); ++m)
      if (result.labels_M[m] > 0) {
        line.nll[names_[m]] = result.nll_M[m];
        journal_.scalar("eval/nll_" + names_[m], state_.step, result.nll_M[m]);
      }
    const std::string text = run::to_json_line(line);
    journal_.metrics(text);
    // The measure that `best` means: likelihood of what is being learnt.
    measure_ = result.total();
    if (!state_.best_measure || *measure_ < *state_.best_measure) state_.best_measure = measure_, state_.best_step = state_.step;
    log::info("step ", state_.step, ": held-out ", text);
  }

  // Every process draws, for drawing is forward passes; one keeps the pictures.
  void draw_samples() {
    if (config_.train.sample_prompts.empty() || !model_.is_graft()) return;
    if (!journal_.writes() && !team_.lockstep()) return;
    const fs::path file = write_samples(model_, config_.train.sample_prompts, journal_.writes() ? run_path_ / "samples" : fs::path(), state_.step, uint64_t(config_.run.seed));
    if (!file.empty()) journal_.image_file("samples", state_.step, file);
  }

  void save() {
    state_.last_loss = loss_;
    if (state_.step > 0) state_.lr_factor = schedule_.factor(state_.step - 1);
    state_.seconds = seconds();
    state_.data_cursor = stream_.state();
    journal_.sync();
    writer_.save(state_.step, team_.parts_to_write(checkpoint::parameter_parts(*model_.registry)), team_.parts_to_write(optimizer_.state_parts()), checkpoint::to_json(state_), measure_);
    // Of the training time since the last save of this session, what this one took from it.
    const double now = seconds();
    if (saved_at_) stall_share_ = writer_.last_stall_seconds() / std::max(now - *saved_at_, 1e-9);
    saved_at_ = now;
  }

  void export_base() {
    if (!journal_.writes()) return;
    const fs::path to = run_path_ / "model";
    model::save_base(model_.decoder->base(), to, at::kFloat);
    for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}) {
      const fs::path from = fs::path(config_.model.init ? config_.model.init->tokenizer : config_.model.path) / name;
      if (fs::exists(from)) io::write_file_atomic(to / name, io::read_file(from));
    }
    log::info("wrote ", to.string(), ": a Hugging Face model");
  }

  run::RunConfig config_;
  fs::path run_path_;
  graft::GraftedModel model_;
  std::vector<std::string> names_;  // of the modalities, text first
  Team team_;
  AdamW optimizer_;
  Schedule schedule_;
  data::PrefetchStream stream_;
  std::optional<data::EvalStream> eval_;
  Journal journal_;  // holds the run directory's lock: beyond the writer's end
  checkpoint::CheckpointWriter writer_;
  routing::RoutingStats routing_;
  model::PrefixCache prefix_cache_{config_.train.prefix_cache_mib << 20};
  model::ForwardOptions forward_;
  checkpoint::TrainState state_;
  Health health_{names_, model_.is_graft()};  // what it looks at is equal on every rank, and so is what it ends
  std::vector<int64_t> labels_M_;
  std::set<std::string> idle_groups_;
  std::optional<double> measure_;
  bool balances_ = false;  // with the auxiliary loss
  bool stop_asked_ = false, time_is_up_ = false;
  double loss_ = 0, grad_norm_ = 0;
  std::vector<double> window_nll_;
  std::vector<int64_t> window_labels_;
  int64_t window_tokens_ = 0, window_steps_ = 0, first_step_ = 0, first_tokens_ = 0;  // first: seen before this session
  double window_wait_ = 0, window_step_ = 0, window_exchange_ = 0;  // seconds waiting for batches, in steps, waiting for other processes
  int64_t window_bytes_ = 0;                      // handed to collectives
  double window_start_ = 0, earlier_seconds_ = 0;
  std::optional<double> saved_at_, stall_share_;  // the run's seconds at the last save; not yet logged
  int64_t next_straggler_warning_ = 0;
  Clock::time_point session_start_;
};

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

TrainOutcome train(const run::RunConfig& config_in, const std::string& resume, std::shared_ptr<distributed::World> world, bool accept_data) {
  run::RunConfig config = config_in;
  resolve_paths(config);
  if (!world) world = distributed::World::join({});
  check_layout(config, world->size());
  const distributed::Mesh mesh = distributed::make_mesh(world, config.parallel.expert);
  try {
    return Trainer(config, start_run(config, resume, mesh, accept_data), mesh).run();
  } catch (const std::exception& e) {
    world->announce_failure(e.what());
    throw;
  }
}

TrainOutcome train_together(const distributed::LaunchEnvironment& environment, const std::function<run::RunConfig()>& read_config, const std::string& resume,
                            bool accept_data) {
  std::optional<run::RunConfig> config;
  std::vector<distributed::World::Fact> facts;
  std::optional<std::string> error;
  std::exception_ptr failure;
  distributed::WorldOptions options;
  try {  // all that one process can find wrong by itself, so that the others learn of it instead of waiting
    config = read_config();
    resolve_paths(*config);
    options.device = graft::choose_device(config->model.device, environment.local_rank, environment.local_world_size);
    options.timeout = std::chrono::milliseconds(int64_t(1000 * config->parallel.timeout_seconds));
    check_layout(*config, environment.world_size);
    facts = facts_of(*config, resume);
  } catch (const std::exception& e) {
    failure = std::current_exception();
    error = e.what();
  }
  const auto world = distributed::World::join(environment, options);
  try {
    world->agree(facts, error);
  } catch (const std::exception&) {
    if (failure) std::rethrow_exception(failure);
    throw;
  }
  return train(*config, resume, world, accept_data);
}

}  // namespace moegraft::train
