#include "train_loop.h"

#include "libtorch.h"

#include <algorithm>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/evaluate/likelihood.h"
#include "samples.h"

namespace moegraft::train {

namespace fs = std::filesystem;

TrainLoop::TrainLoop(const run::RunConfig& config, Stage& stage, Session& session, int64_t recompute_layers)
    : config_(config),
      stage_(stage),
      session_(session),
      train_step_(stage, config, recompute_layers),
      metrics_(stage.modality_names, config.train.log_every),
      health_(stage.modality_names, stage.model.is_graft()) {}

TrainOutcome TrainLoop::run() {
  const auto& t = config_.train;
  const checkpoint::TrainState& state = session_.state();
  const bool early = ended_early();
  if (state.step > 0 && (state.step >= t.steps || early)) {
    const std::string why = early ? detail::concat("train.early_stopping_patience ", t.early_stopping_patience)
                                  : detail::concat("train.steps ", t.steps);
    log::info("the run has ended before, after step ", state.step, " (", why, "): nothing to do; raise it to go on");
    return {state.step, state.last_loss, false, true};
  }
  check_start();
  session_.begin();
  metrics_.begin(state.seconds);
  Progress progress("train", t.steps);
  progress.start_at(state.step);
  if (state.step == 0) {
    if (stage_.eval) log_evaluation();
    save();  // what the initialisation made: it is never computed twice
  }
  bool saved = true;
  while (state.step < t.steps) {
    if (last_.stop) {
      if (!saved) save();
      session_.finish_saving();
      progress.finish();
      log::warning("stopped by ", session_.stopped_by(), " after step ", state.step,
                   "; saved. --resume auto continues.");
      return {state.step, last_.loss, true};
    }
    if (ended_early()) {
      log::info("train.early_stopping_patience: ended after step ", state.step, ", for data.eval was best at step ",
                state.best_step, " (", *state.best_measure, "): --checkpoint best reads that one",
                stage_.model.decoder->base().weights->trainable()
                    ? detail::concat("; ", (session_.dir() / "model").string(), " is the last")
                    : "");
      break;
    }
    if (last_.time_is_up) {
      log::info("train.max_minutes (", t.max_minutes, ") reached after step ", state.step);
      break;
    }
    step();
    saved = false;
    progress.update(state.step, session_.status(last_.loss));
    const bool last = state.step == t.steps;
    check_step(last);
    if (state.step % t.log_every == 0 || last) log_metrics();
    if (state.step % config_.routing.every == 0 || last) log_routing(last);
    measure_.reset();
    if (stage_.eval && ((t.eval_every > 0 && state.step % t.eval_every == 0) || last)) log_evaluation();
    if (t.sample_every > 0 && state.step % t.sample_every == 0 && !last) draw_samples();
    if (state.step % config_.checkpoint.every == 0) {
      save();
      saved = true;
    }
  }
  if (!saved) {
    if (stage_.eval && !measure_) log_evaluation();
    save();
  }
  session_.finish_saving();
  progress.finish();
  draw_samples();
  return {state.step, last_.loss, false};
}

// As many evaluations in a row as train.early_stopping_patience without a lower loss.
bool TrainLoop::ended_early() const {
  const auto& t = config_.train;
  const auto& state = std::as_const(session_).state();
  return t.early_stopping_patience > 0 && t.eval_every > 0 && state.best_step >= 0 &&
         state.step - state.best_step >= t.early_stopping_patience * t.eval_every;
}

void TrainLoop::step() {
  last_ = train_step_.run(session_, health_.watches_groups());
  metrics_.add(last_);
  session_.state().tokens_seen += last_.tokens;
  ++session_.state().step;
}

void TrainLoop::log_metrics() {
  const auto& state = session_.state();
  run::TrainingLine line;
  line.step = state.step, line.tokens = state.tokens_seen, line.epochs = stage_.stream.epochs(),
  line.seconds = session_.seconds();
  const auto counts = stage_.stream.counts();
  line.truncated_documents = counts.truncated, line.skipped_documents = counts.skipped;
  line.loss = last_.loss, line.grad_norm = last_.grad_norm, line.lr_factor = stage_.schedule.factor(state.step - 1);
  line.checkpoint_stall_share = session_.take_stall_share();
  if (const auto use = train_step_.take_prefix_use(); use.tokens > 0)
    line.prefix_cache_hit_share = double(use.found) / double(use.tokens);
  metrics_.end_window(line, stage_.distributed);
  for (const auto& [name, value] : run::measures(line)) session_.run_log().scalar("train/" + name, state.step, value);
  session_.run_log().metrics(run::to_json_line(line));
}

void TrainLoop::log_routing(bool last) {
  const auto report = train_step_.take_routing();
  session_.run_log().routing(report, session_.state().step);
  act_on(health_.after_routing(report, session_.state().step, last));
}

void TrainLoop::log_evaluation() {
  auto& state = session_.state();
  model::ForwardOptions options;
  options.lockstep = stage_.distributed.lockstep();
  const auto result = evaluate::measure_likelihood(
      stage_.model, *stage_.eval, options,
      [this](const std::vector<double>& mine) { return stage_.distributed.sum(mine, "evaluation"); });
  run::EvaluationLine line;
  line.step = state.step;
  for (size_t m = 0; m < result.nll_M.size(); ++m)
    if (result.labels_M[m] > 0) {
      const std::string& name = stage_.modality_names[m];
      line.nll[name] = result.nll_M[m];
      session_.run_log().scalar("eval/nll_" + name, state.step, result.nll_M[m]);
    }
  const std::string text = run::to_json_line(line);
  session_.run_log().metrics(text);
  // The measure that `best` means: likelihood of what is being learnt.
  measure_ = result.total();
  if (!state.best_measure || *measure_ < *state.best_measure)
    state.best_measure = measure_, state.best_step = state.step;
  log::info("step ", state.step, ": held-out ", text);
}

// Every process generates, for generating is forward passes; one keeps the images.
void TrainLoop::draw_samples() {
  if (config_.train.sample_prompts.empty() || !stage_.model.is_graft()) return;
  RunLog& run_log = session_.run_log();
  if (!run_log.writes() && !stage_.distributed.lockstep()) return;
  const int64_t step = session_.state().step;
  const fs::path file =
      write_samples(stage_.model, config_.train.sample_prompts,
                    run_log.writes() ? session_.dir() / "samples" : fs::path(), step, uint64_t(config_.run.seed));
  if (!file.empty()) run_log.image_file("samples", step, file);
}

void TrainLoop::save() {
  auto& state = session_.state();
  state.last_loss = last_.loss;
  if (state.step > 0) state.lr_factor = stage_.schedule.factor(state.step - 1);
  state.data_cursor = stage_.stream.state();
  const DistributedStep& distributed = stage_.distributed;
  session_.save(distributed.parts_to_write(checkpoint::parameter_parts(*stage_.model.registry)),
                distributed.parts_to_write(stage_.optimizer.state_parts()), measure_);
}

void TrainLoop::check_start() {
  const auto& t = config_.train;
  const auto& state = session_.state();
  StartFacts facts;
  facts.step = state.step, facts.steps = t.steps, facts.warmup = t.warmup;
  facts.sequence_length = config_.data.sequence_length,
  facts.max_positions = stage_.model.decoder->spec().max_positions;
  facts.trainable = stage_.model.registry->num_elements();
  for (const auto& p : stage_.model.registry->all()) facts.groups.insert(p.group);
  facts.learning_rates = {{"lora", t.lora.lr}, {"embeddings", t.embeddings.lr}, {"base", t.base.lr}};
  facts.lr_before = state.step > 0 ? state.lr_factor : -1, facts.lr_now = stage_.schedule.factor(state.step);
  facts.lr_was_now = stage_.schedule.factor(std::max<int64_t>(0, state.step - 1));
  act_on(health_.at_start(facts));
}

void TrainLoop::check_step(bool last) {
  StepFacts facts;
  facts.step = session_.state().step, facts.last = last, facts.loss = last_.loss, facts.grad_norm = last_.grad_norm;
  facts.labels_M = last_.labels_M, facts.idle_groups = last_.idle_groups;
  act_on(health_.after_step(facts));
}

// One line each, once; with train.strict the first ends the run.
void TrainLoop::act_on(const std::vector<Finding>& findings) {
  for (const auto& f : findings) {
    log::warning("step ", f.step, ": ", f.text);
    session_.run_log().note_warning({f.step, f.check, f.text});
  }
  if (findings.empty() || !config_.train.strict) return;
  if (session_.stepped()) save();
  session_.finish_saving();
  const std::string when =
      session_.stepped() ? detail::concat("after step ", session_.state().step, ", saved,") : "before its first step";
  fail<UserError>("train.strict: ended ", when, " by the warning above (", findings.front().check, ")");
}

}  // namespace moegraft::train
