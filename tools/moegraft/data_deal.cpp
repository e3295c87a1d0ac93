// moegraft data deal: how evenly a run's steps would be dealt to its processes. Reads lengths and modalities of
// documents; no model, no ids.
#include "data_deal.h"

#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "moegraft/base/clock.h"
#include "moegraft/config/config.h"
#include "moegraft/data/balance.h"
#include "moegraft/model/weights.h"
#include "moegraft/run/run_config.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "vocabulary.h"

namespace moegraft::tools {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string config;
  std::vector<std::string> set;
  std::vector<int64_t> world = {2, 4, 8};
  int64_t steps = 100;
  bool json = false;
};

model::Vocabulary text_vocabulary(const model::ModelConfig& config) {
  if (!config.init) {
    const model::DecoderSpec s = model::read_spec(config.path);
    return {s.vocab_size, s.bos_id, s.eos_id, {}};
  }
  const auto tokenizer = tokenizer::load_tokenizer(config.init->tokenizer);
  return {std::max(config.init->vocab_size, tokenizer->size()), tokenizer->bos_id(), tokenizer->eos_id(), {}};
}

Json to_json(const data::Imbalance& i) { return {{"mean", i.mean}, {"worst", i.worst}, {"over_steps", i.over_steps}}; }

void run(const Options& o) {
  const auto config = config::parse<run::RunConfig>(config::Document::from_file(o.config, o.set));
  const model::Vocabulary vocabulary = vocabulary_of(text_vocabulary(config.model), config.modalities);
  Json out{{"accumulation", config.train.accumulation},
           {"tokens_per_step", config.data.tokens_per_step},
           {"results", Json::array()}};
  if (!o.json)
    std::printf(
        "largest / mean over ranks          cost          tokens of new modalities\nbatching   world   kinds/step    "
        "mean   worst    mean   worst   step tokens\n");
  for (const auto& [batching, name, meaning] : data::kBatchings)
    for (const int64_t world : o.world) {
      data::DataConfig dealt = config.data;
      dealt.batching = batching;
      data::BatchStream stream(dealt.train, dealt, vocabulary, uint64_t(config.run.seed));
      stream.set_warn([](const std::string&) {});
      const auto start = std::chrono::steady_clock::now();
      const data::Balance b =
          data::measure_balance(stream, {config.train.accumulation, 0, world}, dealt.sequence_length, o.steps);
      const double seconds = seconds_since(start);
      out["results"].push_back({{"batching", name},
                                {"world", world},
                                {"steps", b.steps},
                                {"tokens", b.tokens},
                                {"sequences", b.sequences},
                                {"combinations_per_step", b.combinations_per_step},
                                {"smallest_step", b.smallest_step},
                                {"largest_step", b.largest_step},
                                {"empty_parts", b.empty_parts},
                                {"truncated", stream.counts().truncated},
                                {"skipped", stream.counts().skipped},
                                {"cost", to_json(b.cost)},
                                {"new_tokens", to_json(b.new_tokens)},
                                {"planning_ms_per_step", 1e3 * seconds / double(o.steps)}});
      if (!o.json)
        std::printf("%-8s %7lld %12.2f %7.3f %7.3f %7.3f %7.3f   %lld to %lld\n", name, static_cast<long long>(world),
                    b.combinations_per_step, b.cost.mean, b.cost.worst, b.new_tokens.mean, b.new_tokens.worst,
                    static_cast<long long>(b.smallest_step), static_cast<long long>(b.largest_step));
    }
  if (o.json) std::cout << out.dump() << std::endl;
}

}  // namespace

void add_deal(CLI::App& data) {
  auto o = std::make_shared<Options>();
  auto* command = data.add_subcommand(
      "deal", "How evenly a run's steps are dealt to its processes, with data.batching mixed and modality");
  command->add_option("-c,--config", o->config, "A run's YAML")->required();
  command->add_option("--set", o->set, "Override a key of the config")->take_all()->allow_extra_args(false);
  command->add_option("--world", o->world, "Processes")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  command->add_option("--steps", o->steps, "Optimizer steps")->check(CLI::Range(1, 1 << 30))->capture_default_str();
  command->add_flag("--json", o->json, "One JSON object on stdout");
  command->footer(
      "Example:\n  moegraft data deal -c configs/quickstart/graft.yaml --world 2 4 8 --steps 100\n  -> the largest "
      "share of a rank over the mean one: 1 is perfect");
  command->callback([o] { run(*o); });
}

}  // namespace moegraft::tools
