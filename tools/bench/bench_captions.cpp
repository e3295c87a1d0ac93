// moegraft bench captions: what the frozen prefix and the cache of captions save of a step on caption + picture data.
// One model, one set of captions per share; the ways of running a step take turns, so that a machine's moods meet them
// all.
#include "libtorch.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/model/device.h"
#include "moegraft/model/prefix_cache.h"

namespace moegraft::tools::bench {
namespace {

struct CaptionOptions {
  ModelOptions model;
  std::vector<double> shares{0.1, 0.25, 0.5};
  int64_t sequences = 16, seq = 128, codes = 1024, rounds = 5, threads = 0;
  bool json = false;
};

// Sequences of `seq` tokens, the first share of them a caption, the rest a picture; only the picture is learnt.
// Captions differ by `first`.
model::PackedBatch make_batch(const CaptionOptions& o, double share, int64_t first, const graft::GraftedModel& m) {
  const model::ModalityTokens& tokens = m.vocabulary.modalities.front();
  const int64_t T = o.sequences * o.seq, text = std::clamp<int64_t>(std::llround(share * double(o.seq)), 1, o.seq - 2);
  model::PackedBatch batch;
  batch.ids_T = at::empty({T}, at::kLong);
  batch.modality_T = at::zeros({T}, at::kLong);
  batch.positions_T = at::empty({T}, at::kLong);
  batch.labels_T = at::full({T}, model::kNoLabel, at::kLong);
  int64_t *ids = batch.ids_T.data_ptr<int64_t>(), *modality = batch.modality_T.data_ptr<int64_t>(),
          *positions = batch.positions_T.data_ptr<int64_t>(), *labels = batch.labels_T.data_ptr<int64_t>();
  batch.cu_seqlens = {0};
  for (int64_t i = 0; i < o.sequences; ++i) {
    Rng rng(0, "bench.captions", uint64_t(first + i));
    const int64_t begin = i * o.seq;
    for (int64_t t = 0; t < o.seq; ++t) {
      positions[begin + t] = t;
      if (t < text) {
        ids[begin + t] = 3 + int64_t(rng.below(uint64_t(m.decoder->spec().vocab_size - 3)));
        continue;
      }
      ids[begin + t] = t == text ? tokens.begin_id() : tokens.code_id(int64_t(rng.below(uint64_t(tokens.num_codes))));
      modality[begin + t] = tokens.modality;
      if (t > text) labels[begin + t - 1] = ids[begin + t];
    }
    batch.cu_seqlens.push_back(begin + o.seq);
  }
  batch.facts = std::make_shared<model::BatchFacts>(model::describe_batch(batch, m.decoder->id_bounds()));
  return model::to_device(batch, m.device());
}

Json measure(const CaptionOptions& o, double share, const graft::GraftedModel& m) {
  const model::PackedBatch batch = make_batch(o, share, 0, m);
  train::AdamW optimizer(*m.registry, every_group(*m.registry, {0.0, 0.0}),
                         {0.9, 0.999, 1e-8});  // the weights stay: every way computes the same
  model::PrefixCache warm(int64_t{1} << 40);
  double loss = 0;
  const auto step = [&](bool frozen, model::PrefixCache* cache) {
    model::ForwardOptions forward;
    forward.frozen_prefix = frozen;
    forward.prefix_cache = cache;
    m.registry->zero_grad();
    synchronize(m.device());
    const auto start = Clock::now();
    const auto result = model::cross_entropy_loss(*m.decoder, m.decoder->forward(batch, forward), batch);
    result.loss.backward();
    optimizer.step(1.0);
    synchronize(m.device());
    loss = result.loss.item<double>();
    return seconds_since(start);
  };
  step(false, nullptr), step(true, &warm);  // panels, kernels, the cache
  const bool together = warm.may_share_a_pass(m.decoder->spec(), *m.decoder->base().weights);
  std::vector<double> plain, frozen, cold, hits;
  double cold_loss = 0, warm_loss = 0;
  for (int64_t i = 0; i < o.rounds; ++i) {
    plain.push_back(step(false, nullptr));
    frozen.push_back(step(true, nullptr));
    model::PrefixCache empty(int64_t{1} << 40);
    empty.may_share_a_pass(m.decoder->spec(), *m.decoder->base().weights);  // asked once in a run
    cold.push_back(step(true, &empty));
    cold_loss = loss;
    hits.push_back(step(true, &warm));
    warm_loss = loss;
  }
  MOEGRAFT_CHECK(cold_loss == warm_loss, "bench captions: the loss with known captions is ", warm_loss,
                 ", with new ones ", cold_loss);
  const auto best = [](const std::vector<double>& t) { return *std::min_element(t.begin(), t.end()); };
  const int64_t tokens = batch.facts->text_prefix[0] * o.sequences;
  return {{"caption_share", double(tokens) / double(batch.num_tokens())},
          {"whole_backward_s", best(plain)},
          {"frozen_prefix_s", best(frozen)},
          {"cache_cold_s", best(cold)},
          {"cache_warm_s", best(hits)},
          {"median",
           {{"whole_backward_s", median(plain)},
            {"frozen_prefix_s", median(frozen)},
            {"cache_cold_s", median(cold)},
            {"cache_warm_s", median(hits)}}},
          {"bytes_per_caption_token", double(warm.bytes()) / double(tokens)},
          {"one_pass", together}};
}

void run(const CaptionOptions& given) {
  CaptionOptions o = given;
  MOEGRAFT_CHECK_USAGE(!o.model.model.empty(), "bench captions: give a model: a Hugging Face directory");
  for (const double s : o.shares) MOEGRAFT_CHECK_USAGE(s > 0 && s < 1, "--shares must lie between 0 and 1, got ", s);
  set_threads(o.threads);
  o.model.codes = o.codes;
  const graft::GraftedModel m = open_model(o.model);
  Json results = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const double share : o.shares) {
    Json r = measure(o, share, m);
    const double frozen = r["frozen_prefix_s"].get<double>(), cold = r["cache_cold_s"].get<double>(),
                 warm = r["cache_warm_s"].get<double>();
    rows.push_back({fixed(100 * r["caption_share"].get<double>(), 0),
                    fixed(1e3 * r["whole_backward_s"].get<double>(), 1), fixed(1e3 * frozen, 1), fixed(1e3 * cold, 1),
                    fixed(1e3 * warm, 1), fixed(100 * (cold / frozen - 1), 1), fixed(100 * (1 - warm / frozen), 1),
                    fixed(r["bytes_per_caption_token"].get<double>() / 1024, 1)});
    results.push_back(std::move(r));
  }
  if (o.json)
    std::cout << Json{{"tool", "moegraft"},         {"dtype", o.model.dtype},
                      {"sequences", o.sequences},   {"seq", o.seq},
                      {"rank", o.model.rank},       {"threads", at::get_num_threads()},
                      {"device", m.device().str()}, {"shares", results}}
                     .dump()
              << '\n';
  else
    print_table(
        {"captions %", "whole ms", "frozen ms", "cold ms", "warm ms", "cold costs %", "warm saves %", "KiB/token"},
        rows);
}

}  // namespace

void add_captions_command(CLI::App& bench) {
  auto o = std::make_shared<CaptionOptions>();
  CLI::App* cmd = bench.add_subcommand("captions",
                                       "A step on captions and pictures: whole backward pass, frozen prefix, its cache "
                                       "with new and with known captions");
  add_model_options(*cmd, o->model);
  cmd->add_option("--shares", o->shares, "Shares of a sequence that are its caption")
      ->delimiter(',')
      ->capture_default_str();
  cmd->add_option("--sequences", o->sequences, "Sequences of a step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--seq", o->seq, "Tokens of a sequence")->check(CLI::Range(4, 1 << 24))->capture_default_str();
  cmd->add_option("--codes", o->codes, "Codebook of the pictures")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  cmd->add_option("--rounds", o->rounds, "Times that each way takes its turn; the best counts")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer("Example: moegraft bench captions models/base --shares 0.1,0.25,0.5 --sequences 16 --seq 128");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools::bench
