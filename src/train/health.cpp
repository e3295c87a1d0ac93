#include "health.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::train {
namespace {

using detail::concat;

// A check: its name in run.json, and the line that it says, empty where all is well.
template <class Facts>
struct Check {
  const char* name;
  std::string (*look)(const Facts&);
};

const Check<StartFacts> kStartChecks[] = {
    {"nothing_trains",
     [](const StartFacts& f) {
       return f.trainable == 0 ? std::string("nothing trains: no adapter, no new rows, a frozen base") : "";
     }},
    {"warmup",
     [](const StartFacts& f) {
       return f.warmup > f.steps ? concat("train.warmup (", f.warmup, ") is longer than train.steps (", f.steps,
                                          "): the learning rate never reaches its peak")
                                 : "";
     }},
    {"positions",
     [](const StartFacts& f) {
       return f.max_positions > 0 && f.sequence_length > f.max_positions
                  ? concat("data.sequence_length (", f.sequence_length, ") is beyond the ", f.max_positions,
                           " positions that the base was made for (max_position_embeddings)")
                  : "";
     }},
    {"learning_rate",
     [](const StartFacts& f) {
       std::vector<std::string> idle;
       for (const auto& group : f.groups)
         if (const auto lr = f.learning_rates.find(group); lr != f.learning_rates.end() && lr->second == 0)
           idle.push_back("train." + group + ".lr");
       return idle.empty() ? ""
                           : concat(join(idle, ", "), idle.size() == 1 ? " is 0: its group does not learn"
                                                                       : " are 0: their groups do not learn");
     }},
    {"schedule_jump",
     [](const StartFacts& f) {
       const bool jumps = f.lr_before >= 0 && std::abs(f.lr_was_now - f.lr_before) > std::max(0.02, 0.1 * f.lr_before);
       return jumps ? concat("the learning rate jumps from ", std::round(1000 * f.lr_before) / 1000, " to ",
                             std::round(1000 * f.lr_now) / 1000,
                             " of its peak: train.steps, warmup or schedule are not those that the run went by")
                    : "";
     }},
};

}  // namespace

std::vector<Finding> Health::once(int64_t step, std::vector<std::pair<const char*, std::string>> said) {
  std::vector<Finding> out;
  for (auto& [name, text] : said)
    if (!text.empty() && said_.insert(name).second) out.push_back({step, name, std::move(text)});
  return out;
}

std::vector<Finding> Health::at_start(const StartFacts& facts) {
  std::vector<std::pair<const char*, std::string>> said;
  for (const auto& check : kStartChecks) said.emplace_back(check.name, check.look(facts));
  return once(facts.step, std::move(said));
}

std::vector<Finding> Health::after_step(const StepFacts& f) {
  ++steps_;
  for (size_t m = 0; m < std::min(labels_M_.size(), f.labels_M.size()); ++m) labels_M_[m] += f.labels_M[m];
  same_loss_ = steps_ > 1 && f.loss == last_loss_ ? same_loss_ + 1 : 0;
  last_loss_ = f.loss;
  for (const auto& group : f.idle_groups) ++idle_[group];

  std::vector<std::pair<const char*, std::string>> said;
  if (is_graft_ && (steps_ == kFirstSteps || (f.last && steps_ < kFirstSteps))) {
    std::vector<std::string> absent;
    for (size_t m = 1; m < labels_M_.size(); ++m)
      if (labels_M_[m] == 0) absent.push_back(names_[m]);
    said.emplace_back("no_labels", absent.empty() ? ""
                                                  : concat("no label of ", join(absent, ", "), " in the first ", steps_,
                                                           " steps: does data.train hold such documents?"));
    std::vector<std::string> idle;
    for (const auto& [group, steps] : idle_)
      if (steps == steps_) idle.push_back(group);
    said.emplace_back("idle_group", idle.empty()
                                        ? ""
                                        : concat("the group ", join(idle, ", "), " had no gradient in the first ",
                                                 steps_, " steps: nothing of it takes part in the loss"));
  }
  // A graft has nothing to learn from a step of text alone, which mixed data may hold.
  zero_gradients_ = f.grad_norm == 0 ? zero_gradients_ + 1 : 0;
  const bool should_learn =
      !is_graft_ || std::any_of(f.labels_M.begin() + std::min<int64_t>(1, int64_t(f.labels_M.size())), f.labels_M.end(),
                                [](int64_t n) { return n > 0; });
  const bool zero =
      zero_gradients_ > 0 && (should_learn || zero_gradients_ == kFirstSteps || (f.last && zero_gradients_ == steps_));
  said.emplace_back("zero_gradient",
                    zero ? "the gradient is exactly 0: nothing that trains takes part in the loss" : "");
  said.emplace_back(
      "constant_loss",
      same_loss_ >= 5 ? concat("the loss has been ", f.loss, " to the last bit for ", same_loss_ + 1, " steps") : "");
  return once(f.step, std::move(said));
}

std::vector<Finding> Health::after_routing(const routing::RoutingReport& report, int64_t step, bool last) {
  int64_t idle = 0, all = 0;
  double most = 0;
  std::string first;
  for (const auto& layer : report.layers) {
    const auto& modalities = layer.modalities;
    auto& selections_ME = selections_LME_[layer.layer];
    selections_ME.resize(modalities.size(), std::vector<double>(size_t(report.num_experts), 0.0));
    for (size_t m = is_graft_; m < modalities.size(); ++m) {
      auto& sums_E = selections_ME[m];
      for (size_t e = 0; e < modalities[m].load_E.size() && modalities[m].tokens > 0; ++e)
        sums_E[e] += modalities[m].load_E[e] * double(modalities[m].tokens);
      const double seen = std::accumulate(sums_E.begin(), sums_E.end(), 0.0);
      most = std::max(most, seen);
      all += report.num_experts;
      if (seen == 0) continue;
      for (size_t e = 0; e < sums_E.size(); ++e)
        if (sums_E[e] == 0 && idle++ == 0) first = concat("layer ", layer.layer, " expert ", e);
    }
  }
  // Of a few hundred tokens not every expert of many can have one, and while a run goes on one may still come.
  const bool enough = most > (last ? 100.0 : 1000.0) * double(report.num_experts);
  return once(step, {{"idle_experts", enough && idle > 0 ? concat(idle, " of ", all, " experts never got a token",
                                                                  is_graft_ ? " of the new modality" : "",
                                                                  " (the first: ", first, "): they do not learn")
                                                         : ""}});
}

}  // namespace moegraft::train
