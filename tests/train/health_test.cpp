// What is said of a training that learns nothing, check by check.
#include "train/health.h"

#include <gtest/gtest.h>

namespace moegraft::train {
namespace {

std::vector<std::string> names(const std::vector<Finding>& findings) {
  std::vector<std::string> out;
  for (const auto& f : findings) out.push_back(f.check);
  return out;
}
using Names = std::vector<std::string>;

StartFacts good_start() {
  StartFacts f;
  f.steps = 100, f.warmup = 10, f.sequence_length = 128, f.max_positions = 128, f.trainable = 1000;
  f.groups = {"lora", "embeddings"};
  f.learning_rates = {{"lora", 1e-3}, {"embeddings", 1e-2}, {"base", 0}};
  return f;
}

TEST(Health, StartChecks) {
  struct Case {
    const char* name;
    void (*change)(StartFacts&);
    Names expected;
    const char* text;
  };
  const Case cases[] = {
      {"all well", [](StartFacts&) {}, {}, ""},
      {"nothing trains", [](StartFacts& f) { f.trainable = 0; }, {"nothing_trains"}, "nothing trains"},
      {"warm-up as long as the run reaches its peak", [](StartFacts& f) { f.warmup = 100; }, {}, ""},
      {"warm-up longer",
       [](StartFacts& f) { f.warmup = 101; },
       {"warmup"},
       "train.warmup (101) is longer than train.steps (100)"},
      {"positions",
       [](StartFacts& f) { f.sequence_length = 129; },
       {"positions"},
       "data.sequence_length (129) is beyond the 128 positions"},
      {"a base that names no positions", [](StartFacts& f) { f.sequence_length = 129, f.max_positions = 0; }, {}, ""},
      {"a rate of 0", [](StartFacts& f) { f.learning_rates["lora"] = 0; }, {"learning_rate"}, "train.lora.lr is 0"},
      {"of a group that is not there",
       [](StartFacts& f) { f.groups = {"embeddings"}, f.learning_rates["lora"] = 0; },
       {},
       ""},
      {"a resume by the same schedule",
       [](StartFacts& f) { f.lr_before = f.lr_was_now = 0.5, f.lr_now = 0.49; },
       {},
       ""},
      {"a resume by another",
       [](StartFacts& f) { f.lr_before = 0.05, f.lr_was_now = 0.7, f.lr_now = 0.6; },
       {"schedule_jump"},
       "jumps from 0.05 to 0.6 of its peak"},
      {"two at once", [](StartFacts& f) { f.warmup = 200, f.sequence_length = 500; }, {"warmup", "positions"}, ""},
  };
  for (const auto& c : cases) {
    StartFacts facts = good_start();
    c.change(facts);
    const auto found = Health({"text", "image"}, true).at_start(facts);
    EXPECT_EQ(names(found), c.expected) << c.name;
    if (!found.empty()) { EXPECT_NE(found[0].text.find(c.text), std::string::npos) << found[0].text; }
  }
}

TEST(Health, StepChecks) {
  struct Case {
    const char* name;
    bool graft;
    int64_t steps;
    void (*change)(StepFacts&, int64_t step);
    Names expected;
  };
  const Case cases[] = {
      {"all well", true, 20, [](StepFacts&, int64_t) {}, {}},
      {"no label of the modality", true, 20, [](StepFacts& f, int64_t) { f.labels_M = {9, 0}; }, {"no_labels"}},
      {"one in ten steps", true, 20, [](StepFacts& f, int64_t step) { f.labels_M = {9, step == 7}; }, {}},
      {"none in a run of three", true, 3, [](StepFacts& f, int64_t) { f.labels_M = {9, 0}; }, {"no_labels"}},
      {"a base has none", false, 20, [](StepFacts& f, int64_t) { f.labels_M = {9, 0}; }, {}},
      {"zero gradient, said once",
       true,
       20,
       [](StepFacts& f, int64_t step) { f.grad_norm = step > 4 ? 0 : 1; },
       {"zero_gradient"}},
      {"steps of text alone in between",
       true,
       20,
       [](StepFacts& f, int64_t step) {
         if (step % 2) f.grad_norm = 0, f.labels_M = {9, 0};
       },
       {}},
      {"text alone",
       true,
       3,
       [](StepFacts& f, int64_t) { f.grad_norm = 0, f.labels_M = {9, 0}; },
       {"no_labels", "zero_gradient"}},
      {"text alone from some step on",
       true,
       30,
       [](StepFacts& f, int64_t step) {
         if (step > 15) f.grad_norm = 0, f.labels_M = {9, 0};
       },
       {"zero_gradient"}},
      {"a base of text",
       false,
       3,
       [](StepFacts& f, int64_t step) {
         if (step == 2) f.grad_norm = 0, f.labels_M = {9, 0};
       },
       {"zero_gradient"}},
      {"constant loss", true, 20, [](StepFacts& f, int64_t) { f.loss = 3; }, {"constant_loss"}},
      {"a loss that comes back", true, 20, [](StepFacts& f, int64_t step) { f.loss = double(step % 2); }, {}},
      {"a group without gradient", true, 20, [](StepFacts& f, int64_t) { f.idle_groups = {"lora"}; }, {"idle_group"}},
      {"a group that has one now and then",
       true,
       20,
       [](StepFacts& f, int64_t step) {
         if (step != 3) f.idle_groups = {"lora"};
       },
       {}},
  };
  for (const auto& c : cases) {
    Health health({"text", "image"}, c.graft);
    Names said;
    for (int64_t step = 1; step <= c.steps; ++step) {
      StepFacts facts;
      facts.step = step, facts.last = step == c.steps, facts.loss = 1.0 / double(step), facts.grad_norm = 1,
      facts.labels_M = {5, 5};
      c.change(facts, step);
      for (const auto& name : names(health.after_step(facts))) said.push_back(name);
    }
    EXPECT_EQ(said, c.expected) << c.name;
  }
}

routing::RoutingReport report(int64_t tokens, std::vector<double> image_load) {
  routing::RoutingReport r;
  r.modality_names = {"text", "image"};
  r.num_experts = 4;
  routing::LayerRouting layer;
  layer.modalities.resize(2);
  layer.modalities[0].tokens = 100, layer.modalities[0].load_E = {1, 0, 0, 0};
  layer.modalities[1].tokens = tokens, layer.modalities[1].load_E = std::move(image_load);
  r.layers = {layer};
  return r;
}

TEST(Health, ExpertsThatNeverGotAToken) {
  struct Case {
    const char* name;
    bool graft, last;  // last: the second report is the run's last
    int64_t tokens;
    std::vector<double> first, second;  // the modality's load
    const char* text;                   // of the only finding; empty: none
  };
  const Case cases[] = {
      {"one of four",
       true,
       true,
       1000,
       {0.5, 0.5, 0, 0},
       {0.5, 0, 0.5, 0},
       "1 of 4 experts never got a token of the new modality (the first: layer 0 expert 3)"},
      {"none", true, true, 1000, {0.5, 0.5, 0, 0}, {0, 0, 0.5, 0.5}, ""},
      {"too few tokens to say", true, true, 20, {1, 0, 0, 0}, {1, 0, 0, 0}, ""},
      {"while the run goes on", true, false, 1000, {1, 0, 0, 0}, {1, 0, 0, 0}, ""},
      {"long enough", true, false, 10000, {1, 0, 0, 0}, {0, 0.5, 0.5, 0}, "3 of 4 experts"},  // said after the first
                                                                                              // report
      {"a base: text counts",
       false,
       true,
       1000,
       {0.25, 0.25, 0.25, 0.25},
       {0.25, 0.25, 0.25, 0.25},
       "3 of 8 experts never got a token (the first: layer 0 expert 1)"},
  };
  for (const auto& c : cases) {
    Health health({"text", "image"}, c.graft);
    auto found = health.after_routing(report(c.tokens, c.first), 3, false);
    for (auto& f : health.after_routing(report(c.tokens, c.second), 7, c.last)) found.push_back(std::move(f));
    EXPECT_EQ(found.size(), size_t(*c.text != '\0')) << c.name;
    if (!found.empty()) {
      EXPECT_EQ(found[0].check, "idle_experts");
      EXPECT_NE(found[0].text.find(c.text), std::string::npos) << c.name << ": " << found[0].text;
    }
  }
}

}  // namespace
}  // namespace moegraft::train
