#include "moegraft/data/stream.h"

#include <nlohmann/json.hpp>
#include <numeric>

#include "data/packer.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/rng.h"

namespace moegraft::data {
namespace {

using Json = nlohmann::json;

std::vector<Source> open_sources(const std::vector<SourceConfig>& configs, const model::Vocabulary& vocabulary, const char* key) {
  MOEGRAFT_CHECK_USAGE(!configs.empty(), key, " must name at least one source");
  std::vector<Source> sources;
  for (const auto& config : configs) sources.emplace_back(config.path, vocabulary);
  return sources;
}

Packer make_packer(const DataConfig& config, int64_t micro_batch_tokens) {
  const Packer packer{config.packing == "stream", config.sequence_length, micro_batch_tokens > 0 ? micro_batch_tokens : config.tokens_per_step};
  MOEGRAFT_CHECK_USAGE(packer.stream || packer.budget >= config.sequence_length, "data.tokens_per_step / train.accumulation must be at least data.sequence_length (", config.sequence_length,
                       ") so that every document fits, got ", packer.budget);
  return packer;
}

model::PackedBatch described(model::PackedBatch batch, const std::vector<int64_t>& id_bounds) {
  batch.facts = std::make_shared<const model::BatchFacts>(model::describe_batch(batch, id_bounds));
  return batch;
}

}  // namespace

struct BatchStream::Impl : DocumentFeed {
  std::vector<Source> sources;
  std::vector<double> cumulative;  // weights
  DataConfig config;
  model::Vocabulary vocabulary;
  std::vector<int64_t> id_bounds;
  uint64_t seed = 0;
  Packer packer;
  Warn warn = [](const std::string& message) { log::warning(message); };

  // The cursor.
  int64_t draws = 0, offset = 0;
  std::vector<int64_t> taken;  // documents drawn from each source
  StreamCounts counts;

  // Derived from the cursor.
  std::vector<int64_t> shuffled_epoch;
  std::vector<std::vector<int64_t>> order;
  bool loaded = false;
  int64_t loaded_source = 0;
  Sequence loaded_document;
  int64_t skipped_in_a_row = 0;

  int64_t total_documents() const {
    return std::accumulate(sources.begin(), sources.end(), int64_t{0}, [](int64_t sum, const Source& s) { return sum + s.num_documents(); });
  }

  int64_t pick_source() const {
    const double point = Rng(seed, "data.source", static_cast<uint64_t>(draws)).uniform() * cumulative.back();
    for (size_t s = 0; s < cumulative.size(); ++s)
      if (point < cumulative[s]) return static_cast<int64_t>(s);
    return static_cast<int64_t>(cumulative.size()) - 1;
  }

  const Sequence* current() override {
    if (loaded) return &loaded_document;
    const int64_t s = pick_source(), n = sources[s].num_documents(), epoch = taken[s] / n;
    if (shuffled_epoch[s] != epoch) {
      order[s] = Rng(seed, "data.shuffle." + std::to_string(s), static_cast<uint64_t>(epoch)).permutation(n);
      shuffled_epoch[s] = epoch;
    }
    const auto segments = sources[s].document(order[s][taken[s] % n]);
    const bool drop = config.caption_dropout > 0 && is_captioned_item(segments, vocabulary) &&
                      Rng(seed, "data.caption_dropout", static_cast<uint64_t>(draws)).uniform() < config.caption_dropout;
    loaded_document = assemble(segments, vocabulary, config, drop);
    loaded_source = s;
    loaded = true;
    return &loaded_document;
  }

  void advance() override {
    ++draws;
    ++taken[loaded_source];
    ++counts.documents;
    loaded = false;
  }

  void on_truncated() override {
    if (counts.truncated++ == 0)
      warn(moegraft::detail::concat("data: a text document of ", loaded_document.size(), " tokens is cut at data.sequence_length ", config.sequence_length,
                                    "; further ones are counted only"));
  }

  void on_skipped() override {
    if (counts.skipped++ == 0)
      warn(moegraft::detail::concat("data: a document of ", loaded_document.size(), " tokens with another modality is longer than data.sequence_length ", config.sequence_length,
                                    " and is skipped; further ones are counted only"));
    MOEGRAFT_CHECK(++skipped_in_a_row <= 2 * total_documents() + 100, "data: no document fits in data.sequence_length ", config.sequence_length, "; the last one has ", loaded_document.size(),
                   " tokens (raise data.sequence_length)");
  }
};

BatchStream::BatchStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary, uint64_t seed, int64_t micro_batch_tokens)
    : impl_(std::make_unique<Impl>()) {
  auto& s = *impl_;
  s.sources = open_sources(sources, vocabulary, "data.train");
  double total = 0;
  for (const auto& source : sources) s.cumulative.push_back(total += source.weight);
  MOEGRAFT_CHECK_USAGE(total > 0, "the weights of data.train must not all be 0");
  s.config = config;
  s.vocabulary = vocabulary;
  s.id_bounds = vocabulary.id_bounds();
  s.seed = seed;
  s.packer = make_packer(config, micro_batch_tokens);
  s.taken.assign(sources.size(), 0);
  s.shuffled_epoch.assign(sources.size(), -1);
  s.order.resize(sources.size());
}

BatchStream::~BatchStream() = default;
BatchStream::BatchStream(BatchStream&&) noexcept = default;

model::PackedBatch BatchStream::next() {
  impl_->skipped_in_a_row = 0;
  return described(pack(impl_->packer.fill(*impl_, impl_->offset)), impl_->id_bounds);
}

std::string BatchStream::state() const {
  const auto& s = *impl_;
  Json documents = Json::array();
  for (const auto& source : s.sources) documents.push_back(source.num_documents());
  return Json{{"version", 1},           {"seed", s.seed},     {"draws", s.draws}, {"offset", s.offset}, {"taken", s.taken}, {"documents", documents},
              {"truncated", s.counts.truncated}, {"skipped", s.counts.skipped}}
      .dump();
}

void BatchStream::restore(const std::string& state) {
  auto& s = *impl_;
  const Json json = Json::parse(state, nullptr, false);
  int64_t draws = 0, offset = 0, truncated = 0, skipped = 0;
  std::vector<int64_t> taken, documents;
  uint64_t seed = 0;
  try {
    MOEGRAFT_CHECK(json.is_object() && json.at("version") == 1, "the data cursor is not one of version 1: ", state.substr(0, 80));
    draws = json.at("draws"), offset = json.at("offset"), truncated = json.at("truncated"), skipped = json.at("skipped"), seed = json.at("seed");
    taken = json.at("taken").get<std::vector<int64_t>>();
    documents = json.at("documents").get<std::vector<int64_t>>();
  } catch (const Json::exception& e) {
    fail("the data cursor is broken: ", e.what());
  }
  MOEGRAFT_CHECK(seed == s.seed, "the data cursor belongs to seed ", seed, ", the run has ", s.seed, " (run.seed may not change on resume)");
  std::vector<int64_t> present;
  for (const auto& source : s.sources) present.push_back(source.num_documents());
  MOEGRAFT_CHECK(documents == present && taken.size() == present.size(), "the data cursor belongs to sources of ", documents, " documents, data.train has ", present,
                 " (data.train may not change on resume)");
  const bool counts_add_up = draws >= 0 && offset >= 0 && std::all_of(taken.begin(), taken.end(), [](int64_t n) { return n >= 0; }) &&
                             std::accumulate(taken.begin(), taken.end(), int64_t{0}) == draws;
  MOEGRAFT_CHECK(counts_add_up, "the data cursor is broken: its counts do not add up: ", state.substr(0, 200));
  s.draws = draws;
  s.taken = taken;
  s.counts = {draws, truncated, skipped};
  s.loaded = false;
  s.offset = 0;
  if (offset > 0) MOEGRAFT_CHECK(offset < s.current()->size(), "the data cursor is ", offset, " tokens into a document of ", s.current()->size());
  s.offset = offset;
}

StreamCounts BatchStream::counts() const { return impl_->counts; }

void BatchStream::set_warn(Warn warn) { impl_->warn = std::move(warn); }

double BatchStream::epochs() const { return static_cast<double>(impl_->draws) / static_cast<double>(impl_->total_documents()); }

struct EvalStream::Impl : DocumentFeed {
  std::vector<Source> sources;
  DataConfig config;
  model::Vocabulary vocabulary;
  Packer packer;
  int64_t tokens_per_source = 0;
  size_t source = 0;
  int64_t index = 0, used = 0, offset = 0;
  bool loaded = false;
  Sequence document;

  const Sequence* current() override {
    while (!loaded && source < sources.size()) {
      if (index < sources[source].num_documents()) {
        document = assemble(sources[source].document(index), vocabulary, config);
        if (index == 0 || tokens_per_source == 0 || used + document.size() <= tokens_per_source) {
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
    used += document.size();
    ++index;
    loaded = false;
  }
  void on_truncated() override {}
  void on_skipped() override {}
};

EvalStream::EvalStream(const std::vector<SourceConfig>& sources, const DataConfig& config, const model::Vocabulary& vocabulary, int64_t max_tokens, int64_t micro_batch_tokens)
    : impl_(std::make_unique<Impl>()) {
  impl_->sources = open_sources(sources, vocabulary, "data.eval");
  impl_->config = config;
  impl_->vocabulary = vocabulary;
  impl_->packer = make_packer(config, micro_batch_tokens);
  impl_->tokens_per_source = max_tokens > 0 ? std::max<int64_t>(1, max_tokens / static_cast<int64_t>(sources.size())) : 0;
}

EvalStream::~EvalStream() = default;
EvalStream::EvalStream(EvalStream&&) noexcept = default;

std::optional<model::PackedBatch> EvalStream::next() {
  const auto sequences = impl_->packer.fill(*impl_, impl_->offset);
  if (sequences.empty()) return std::nullopt;
  return described(pack(sequences), impl_->vocabulary.id_bounds());
}

void EvalStream::rewind() {
  impl_->source = 0;
  impl_->index = impl_->used = impl_->offset = 0;
  impl_->loaded = false;
}

}  // namespace moegraft::data
