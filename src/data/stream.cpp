#include "moegraft/data/stream.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "data/draws.h"
#include "data/mega_batches.h"
#include "data/packer.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"

namespace moegraft::data {
namespace {

using Json = nlohmann::json;

Packer make_packer(const DataConfig& config) {
  const Packer packer{config.packing == Packing::stream, config.sequence_length, config.tokens_per_step};
  MOEGRAFT_CHECK_USAGE(packer.stream || packer.budget >= config.sequence_length,
                       "data.tokens_per_step must be at least data.sequence_length (", config.sequence_length,
                       ") so that every document fits, got ", packer.budget);
  return packer;
}

model::PackedBatch make_batch(const std::vector<Sequence>& sequences, const model::Vocabulary& vocabulary) {
  if (sequences.empty()) return placeholder_batch(vocabulary);
  model::PackedBatch batch = pack(sequences);
  batch.facts = std::make_shared<const model::BatchFacts>(model::describe_batch(batch, vocabulary.id_bounds()));
  return batch;
}

DataConfig without_noise(DataConfig config) {
  config.caption_noise = config.code_noise = 0;
  return config;
}

std::vector<int64_t> lengths_of(const std::vector<PlannedSequence>& sequences) {
  std::vector<int64_t> lengths;
  for (const auto& sequence : sequences) lengths.push_back(sequence.tokens);
  return lengths;
}

}  // namespace

struct BatchStream::Impl : DocumentFeed {
  const DataConfig config;
  const model::Vocabulary vocabulary;
  const uint64_t seed;
  const Share share;
  const Packer packer;
  Draws draws;
  Assembler assembler;
  Warn warn = [](const std::string& message) { log::warning(message); };

  // The cursor, with that of the draws.
  int64_t offset = 0;
  StreamCounts counts;
  int64_t skipped_in_a_row = 0;

  // batching modality: the cursor is where the window began, and the steps used of it. Empty steps: not drawn yet.
  struct Window {
    int64_t number = 0, used = 0;
    DrawCursor begin;
    StreamCounts counts;  // before it
    std::vector<std::vector<PlannedSequence>> steps;
    int64_t tokens = 0;
  } window;

  Impl(const std::vector<SourceConfig>& sources, const DataConfig& data, const model::Vocabulary& tokens,
       uint64_t run_seed, const Share& part)
      : config(data),
        vocabulary(tokens),
        seed(run_seed),
        share(part),
        packer(make_packer(config)),
        draws(sources, config, vocabulary, seed),
        assembler(draws.sources(), vocabulary, rules_of(sources, config), seed) {
    window.begin = draws.cursor();
  }
  bool by_modality() const { return config.batching == Batching::modality; }

  const Document* current() override { return &draws.current(); }
  void advance() override {
    draws.advance();
    ++counts.documents;
  }
  void on_truncated(const Document& document) override {
    if (counts.truncated++ == 0)
      warn(moegraft::detail::concat("data: a text document of ", document.outline.size,
                                    " tokens is cut at data.sequence_length ", config.sequence_length,
                                    "; further ones are counted only"));
  }
  void on_skipped(const Document& document) override {
    const int64_t size = document.outline.size;
    if (counts.skipped++ == 0)
      warn(moegraft::detail::concat("data: a document of ", size,
                                    " tokens with another modality is longer than data.sequence_length ",
                                    config.sequence_length, " and is skipped; further ones are counted only"));
    MOEGRAFT_CHECK(++skipped_in_a_row <= 2 * draws.total_documents() + 100,
                   "data: no document fits in data.sequence_length ", config.sequence_length, "; the last one has ",
                   size, " tokens (raise data.sequence_length)");
  }

  std::vector<PlannedSequence> plan_step() {
    skipped_in_a_row = 0;
    return by_modality() ? plan_mega_batch() : packer.fill(*this, offset);
  }

  void plan_window() {
    std::vector<Document> documents;
    const auto most = static_cast<size_t>(draws.reachable_documents());
    for (int64_t tokens = 0; tokens < kWindowSteps * packer.budget && documents.size() < most; draws.advance()) {
      documents.push_back(draws.current());
      tokens += documents.back().outline.size;
    }
    window.steps = cut_mega_batches(documents, packer, seed, window.number, *this);
    window.tokens = 0;
    for (const auto& step : window.steps)
      for (const auto& sequence : step) window.tokens += sequence.tokens;
  }

  void begin_window(int64_t number) { window = {number, 0, draws.cursor(), counts, {}, 0}; }

  std::vector<PlannedSequence> plan_mega_batch() {
    while (window.steps.empty()) {
      plan_window();
      if (!window.steps.empty()) break;
      counts.documents = draws.cursor().draws;  // none of them fits
      begin_window(window.number + 1);
    }
    auto step = std::move(window.steps[static_cast<size_t>(window.used++)]);
    for (const auto& sequence : step)
      counts.documents += std::count_if(sequence.pieces.begin(), sequence.pieces.end(),
                                        [](const Piece& piece) { return piece.begin == 0; });
    if (window.used == static_cast<int64_t>(window.steps.size())) {
      counts.documents = draws.cursor().draws;  // with those that were skipped
      begin_window(window.number + 1);
    }
    return step;
  }

  // Draws the window again that is begun at the cursor, and passes over the steps that were used.
  void reopen_window(int64_t used, int64_t steps, int64_t tokens) {
    plan_window();
    MOEGRAFT_CHECK(static_cast<int64_t>(window.steps.size()) == steps && window.tokens == tokens && used < steps,
                   "the data cursor is at step ", used, " of a window of ", steps, " steps and ", tokens,
                   " tokens, which has now ", window.steps.size(), " and ", window.tokens,
                   " (the data and the `data` section may not change on resume)");
    while (window.used < used) plan_mega_batch();
  }
};

BatchStream::BatchStream(const std::vector<SourceConfig>& sources, const DataConfig& config,
                         const model::Vocabulary& vocabulary, uint64_t seed, const Share& share)
    : impl_(std::make_unique<Impl>(sources, config, vocabulary, seed, share)) {}

BatchStream::~BatchStream() = default;
BatchStream::BatchStream(BatchStream&&) noexcept = default;

StepBatch BatchStream::next() {
  auto& s = *impl_;
  const auto planned = s.plan_step();
  const Deal dealt = deal(lengths_of(planned), s.share, s.config.sequence_length);
  const int64_t first = s.share.rank * s.share.accumulation;
  std::vector<std::vector<Sequence>> mine(static_cast<size_t>(s.share.accumulation));
  int64_t labels_planned = 0, labels_made = 0;
  StepBatch step;
  // In the order of the step, not of the parts: a joined document goes on from one sequence to the next.
  for (size_t i = 0; i < planned.size(); ++i) {
    step.num_tokens += planned[i].tokens;
    step.num_labels += planned[i].labels;
    const int64_t part = dealt.part_of[i] - first;
    if (part < 0 || part >= s.share.accumulation) continue;
    labels_planned += planned[i].labels;
    mine[static_cast<size_t>(part)].push_back(s.assembler.make(planned[i]));
  }
  for (const auto& sequences : mine) {
    step.micro_batches.push_back(make_batch(sequences, s.vocabulary));
    labels_made += step.micro_batches.back().facts->num_labels;
  }
  MOEGRAFT_INVARIANT(labels_made == labels_planned, "planned ", labels_planned, " labels, made ", labels_made);
  step.rank_tokens.assign(static_cast<size_t>(s.share.world_size), 0);
  for (size_t part = 0; part < dealt.tokens.size(); ++part)
    step.rank_tokens[part / static_cast<size_t>(s.share.accumulation)] += dealt.tokens[part];
  return step;
}

StepOutline BatchStream::skip() {
  StepOutline out;
  for (const auto& sequence : impl_->plan_step()) {
    out.tokens.push_back(sequence.tokens);
    out.labels.push_back(sequence.labels);
    out.new_tokens.push_back(sequence.new_tokens);
    out.modalities.push_back(sequence.modalities);
  }
  return out;
}

std::string BatchStream::state() const {
  const auto& s = *impl_;
  const bool windows = s.by_modality();
  const DrawCursor& cursor = windows ? s.window.begin : s.draws.cursor();
  const StreamCounts& counts = windows ? s.window.counts : s.counts;
  Json json{{"version", 1},
            {"seed", s.seed},
            {"draws", cursor.draws},
            {"offset", s.offset},
            {"taken", cursor.taken},
            {"documents", s.draws.num_documents()},
            {"truncated", counts.truncated},
            {"skipped", counts.skipped}};
  if (windows) {
    json["version"] = 2;
    json["window"] = s.window.number;
    json["window_used"] = s.window.used;
    json["window_steps"] = s.window.used > 0 ? s.window.steps.size() : 0;
    json["window_tokens"] = s.window.used > 0 ? s.window.tokens : 0;
  }
  return json.dump();
}

void BatchStream::restore(const std::string& state) {
  auto& s = *impl_;
  const Json json = Json::parse(state, nullptr, false);
  int64_t version = 0, draws = 0, offset = 0, truncated = 0, skipped = 0, window = 0, used = 0, steps = 0, tokens = 0;
  std::vector<int64_t> taken, documents;
  uint64_t seed = 0;
  try {
    if (json.is_object()) version = json.at("version");
    MOEGRAFT_CHECK(version == 1 || version == 2, "the data cursor is not one of version 1 or 2: ", state.substr(0, 80));
    draws = json.at("draws"), offset = json.at("offset"), truncated = json.at("truncated"),
    skipped = json.at("skipped"), seed = json.at("seed");
    taken = json.at("taken").get<std::vector<int64_t>>();
    documents = json.at("documents").get<std::vector<int64_t>>();
    if (version == 2)
      window = json.at("window"), used = json.at("window_used"), steps = json.at("window_steps"),
      tokens = json.at("window_tokens");
  } catch (const Json::exception& e) { fail("the data cursor is broken: ", e.what()); }
  MOEGRAFT_CHECK(seed == s.seed, "the data cursor belongs to seed ", seed, ", the run has ", s.seed,
                 " (run.seed may not change on resume)");
  MOEGRAFT_CHECK((version == 2) == s.by_modality(),
                 "the data cursor belongs to data.batching: ", version == 2 ? "modality" : "mixed", ", the run has ",
                 config::name_of(s.config.batching), " (it may not change on resume)");
  const auto present = s.draws.num_documents();
  MOEGRAFT_CHECK(documents == present && taken.size() == present.size(), "the data cursor belongs to sources of ",
                 documents, " documents, data.train has ", present, " (data.train may not change on resume)");
  const bool counts_add_up = draws >= 0 && offset >= 0 && window >= 0 && used >= 0 && (version == 1 || offset == 0) &&
                             std::all_of(taken.begin(), taken.end(), [](int64_t n) { return n >= 0; }) &&
                             std::accumulate(taken.begin(), taken.end(), int64_t{0}) == draws;
  MOEGRAFT_CHECK(counts_add_up, "the data cursor is broken: its counts do not add up: ", state.substr(0, 200));
  s.draws.move_to({draws, taken});
  s.counts = {draws, truncated, skipped};
  s.skipped_in_a_row = 0;
  s.offset = 0;
  s.begin_window(window);
  if (used > 0) s.reopen_window(used, steps, tokens);
  if (offset > 0)
    MOEGRAFT_CHECK(offset < s.current()->outline.size, "the data cursor is ", offset, " tokens into a document of ",
                   s.current()->outline.size);
  s.offset = offset;
}

StreamCounts BatchStream::counts() const { return impl_->counts; }

void BatchStream::set_warn(Warn warn) { impl_->warn = std::move(warn); }

double BatchStream::epochs() const {
  return static_cast<double>(impl_->counts.documents) / static_cast<double>(impl_->draws.total_documents());
}

struct EvalStream::Impl : DocumentFeed {
  const DataConfig config;
  const model::Vocabulary vocabulary;
  const Share share;
  const std::vector<Source> sources;
  const Packer packer;
  const int64_t tokens_per_source;
  const std::vector<DataConfig> rules;
  Assembler assembler;
  size_t source = 0;
  int64_t index = 0, used = 0, offset = 0;
  bool loaded = false;
  Document document;

  Impl(const std::vector<SourceConfig>& from, const DataConfig& data, const model::Vocabulary& tokens,
       int64_t max_tokens, const Share& part)
      : config(data),
        vocabulary(tokens),
        share(part),
        sources(open_sources(from, vocabulary, "data.eval")),
        packer(make_packer(config)),
        tokens_per_source(max_tokens > 0 ? std::max<int64_t>(1, max_tokens / static_cast<int64_t>(sources.size())) : 0),
        rules(rules_of(from, without_noise(config))),
        assembler(sources, vocabulary, rules, 0) {}

  const Document* current() override {
    while (!loaded && source < sources.size()) {
      if (index < sources[source].num_documents()) {
        document = {static_cast<int64_t>(source), index, false,
                    outline(sources[source].runs(index), vocabulary, rules[source]), index};
        if (index == 0 || tokens_per_source == 0 || used + document.outline.size <= tokens_per_source) {
          loaded = true;
          break;
        }
      }
      ++source;
      index = used = 0;
    }
    return loaded ? &document : nullptr;
  }
  void advance() override {
    used += document.outline.size;
    ++index;
    loaded = false;
  }
};

EvalStream::EvalStream(const std::vector<SourceConfig>& sources, const DataConfig& config,
                       const model::Vocabulary& vocabulary, int64_t max_tokens, const Share& share)
    : impl_(std::make_unique<Impl>(sources, config, vocabulary, max_tokens, share)) {}

EvalStream::~EvalStream() = default;
EvalStream::EvalStream(EvalStream&&) noexcept = default;

std::optional<model::PackedBatch> EvalStream::next() {
  auto& s = *impl_;
  std::vector<Sequence> mine;
  bool any = false;
  for (int64_t rank = 0; rank < s.share.world_size; ++rank) {
    const auto planned = s.packer.fill(s, s.offset);
    any |= !planned.empty();
    if (rank != s.share.rank) continue;
    for (const auto& sequence : planned) mine.push_back(s.assembler.make(sequence));
  }
  if (!any) return std::nullopt;
  return make_batch(mine, s.vocabulary);
}

void EvalStream::rewind() {
  impl_->source = 0;
  impl_->index = impl_->used = impl_->offset = 0;
  impl_->loaded = false;
}

}  // namespace moegraft::data
