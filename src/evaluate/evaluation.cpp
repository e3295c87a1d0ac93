#include "moegraft/evaluate/evaluation.h"

#include <algorithm>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/codec/pictures.h"
#include "moegraft/data/stream.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/generate/prompt.h"
#include "moegraft/run/identity.h"

namespace moegraft::evaluate {
namespace {

namespace fs = std::filesystem;

// One model and what of its run the measures need.
class Evaluator {
 public:
  Evaluator(graft::GraftedModel model, const EvalConfig& config) : config_(config), model_(std::move(model)) {
    if (model_.config) rules_ = model_.config->data;
    const int64_t most = model_.decoder->spec().max_positions;
    if (config.sequence_length > 0) rules_.sequence_length = config.sequence_length;
    if (most > 0) rules_.sequence_length = std::min(rules_.sequence_length, most);
    rules_.tokens_per_step = std::max<int64_t>(rules_.sequence_length, 2048);
    rules_.packing = "documents";
  }

  graft::GraftedModel& model() { return model_; }
  const model::ModalityTokens& tokens() const { return generate::find_modality(model_, config_.modality); }

  TextResult text() {
    data::DataConfig rules = rules_;
    rules.packing = config_.text->packing;
    data::EvalStream stream(sources(config_.text->shards), rules, model_.vocabulary, config_.text->max_tokens);
    const Likelihood grafted = measure_likelihood(model_, stream);
    MOEGRAFT_CHECK(grafted.labels_M[0] > 0, "text.shards: no text to predict in ", config_.text->shards);
    TextResult result{grafted.labels_M[0], grafted.nll_M[0], {}};
    if (model_.is_graft()) {
      const Detached base(model_);
      result.base_nll = measure_likelihood(model_, stream).nll_M[0];
    }
    return result;
  }

  ImageResult image(const ImageSection& section) {
    const auto items = read_captioned_items(section.shards, model_.vocabulary, tokens(), section.max_items);
    ImageResult result{measure_captions(model_, tokens(), items, rules_, 17), {}};
    if (!unigram_) {
      std::vector<std::string> shards = config_.unigram;
      if (shards.empty() && model_.config)
        for (const auto& source : model_.config->data.train) shards.push_back(source.path);
      if (shards.empty()) return result;
      unigram_ = count_codes(shards, model_.vocabulary, tokens());
    }
    result.unigram = unigram_->nll(items);
    return result;
  }

  routing::RoutingReport routing() {
    std::vector<std::string> names{"text"}, shards = config_.text->shards;
    for (const auto& m : model_.vocabulary.modalities) names.push_back(m.name);
    for (const auto& section : config_.images) shards.push_back(section.shards);
    const auto& spec = model_.decoder->spec();
    routing::RoutingStats stats(spec.num_layers, spec.num_experts, names, model_.device());
    data::EvalStream stream(sources(shards), rules_, model_.vocabulary, config_.routing->max_tokens);
    model::ForwardOptions options;
    options.routing = &stats;
    measure_likelihood(model_, stream, options);
    return stats.read();
  }

 private:
  static std::vector<data::SourceConfig> sources(const std::vector<std::string>& shards) {
    std::vector<data::SourceConfig> out;
    for (const auto& path : shards) out.push_back({path, 1.0});
    return out;
  }

  const EvalConfig& config_;
  graft::GraftedModel model_;
  data::DataConfig rules_;
  std::optional<Unigram> unigram_;
};

graft::OpenOptions open_options(const EvalConfig& config) {
  graft::OpenOptions open;
  if (config.dtype != "auto") open.dtype = graft::parse_dtype(config.dtype);
  open.device = config.device;
  open.checkpoint = config.checkpoint;
  return open;
}

// The run before its first step: checkpoint 0 where it was kept, else made again from its config and seed.
graft::GraftedModel open_start(const fs::path& path, graft::OpenOptions open, const graft::GraftedModel& now) {
  open.checkpoint = "0", open.check_identity = false;
  if (fs::is_directory(path / "checkpoints" / checkpoint::step_name(0))) return graft::open_model(path, open);
  run::RunConfig config = *now.config;
  config.model.device = now.device().is_cuda() ? "cuda" : "cpu";
  return graft::build_model(config);
}

bool asks_for_nothing(const EvalConfig& c) { return !c.text && c.images.empty() && c.codec.empty() && c.retrieval.empty() && !c.drift && !c.routing; }

void check_shards(const graft::GraftedModel& model, const EvalConfig& config) {
  if (!model.config) return;  // a plain model
  std::vector<std::string> sources = config.text ? config.text->shards : std::vector<std::string>();
  for (const auto& section : config.images) sources.push_back(section.shards);
  run::check_shards(sources, run::recorded_fingerprints(model.path), *model.config);  // these were compared when the run was opened
}

std::string dtype_name(at::ScalarType dtype) { return dtype == at::kFloat ? "float32" : "bfloat16"; }

// What a run was set up with: its held-out data.
void take_from_run(EvalConfig& config, const graft::GraftedModel& model) {
  MOEGRAFT_CHECK_USAGE(model.config.has_value(), "nothing to measure: give -c eval.yaml, --text, --images, --retrieval, --codec or --drift");
  for (const auto& source : model.config->data.eval) {
    const data::ShardSet shards(source.path);
    if (shards.schema().modalities.size() == 1) {
      if (!config.text) config.text.emplace();
      config.text->shards.push_back(source.path);
    } else {
      config.images.push_back({fs::path(source.path).filename().string() + (config.images.empty() ? "" : "-" + std::to_string(config.images.size())), source.path});
    }
  }
  if (model.is_graft()) config.drift.emplace();
  MOEGRAFT_CHECK_USAGE(!asks_for_nothing(config), "nothing to measure: the run's data.eval is empty; give -c eval.yaml, --text or --images");
}

}  // namespace

codec::Quality measure_codec(const graft::GraftedModel& model, const model::ModalityTokens& tokens, const CodecSection& section) {
  const auto found = model.codecs.find(tokens.name);
  MOEGRAFT_CHECK(found != model.codecs.end() && found->second, "the codec of ", tokens.name, " is not loaded");
  const auto pictures = codec::load_pictures(section.pictures, found->second->image_size(), found->second->fit());
  const int64_t total = pictures.pixels_N3HW.size(0), count = std::min(total, section.max_items);
  const at::Tensor chosen = (at::arange(count, at::kLong) * total).div(count, "floor");
  return codec::measure(*found->second, pictures.pixels_N3HW.index_select(0, chosen));
}

Evaluation evaluate_model(const fs::path& path, EvalConfig config) {
  const at::NoGradGuard no_grad;
  const graft::OpenOptions open = open_options(config);
  graft::GraftedModel opened = graft::open_model(path, open);
  if (asks_for_nothing(config)) take_from_run(config, opened);
  config.validate("");
  const bool needs_images = !config.images.empty() || !config.codec.empty() || !config.retrieval.empty() || config.routing;
  MOEGRAFT_CHECK_USAGE(opened.is_graft() || (!needs_images && !config.drift), path.string(), " is a plain text model: only text perplexity can be measured");
  check_shards(opened, config);

  Evaluator evaluator(std::move(opened), config);
  graft::GraftedModel& model = evaluator.model();
  Evaluation result;
  result.model = path.string();
  result.dtype = dtype_name(model.decoder->dtype());
  result.device = model.device().str();
  result.step = model.step;
  if (config.text) {
    log::info("text perplexity");
    result.text = evaluator.text();
  }
  for (const auto& section : config.images) {
    log::info("likelihood of pictures: ", section.name);
    result.images[section.name] = evaluator.image(section);
  }
  for (const auto& section : config.codec) {
    log::info("codec: ", section.name);
    result.codec[section.name] = measure_codec(model, evaluator.tokens(), section);
  }
  for (const auto& section : config.retrieval) {
    result.retrieval[section.name] = measure_retrieval(model, evaluator.tokens(), section);
    if (!section.sheet.empty()) result.sheets[section.name] = section.sheet;
  }
  if (config.routing) {
    log::info("routing");
    result.routing = evaluator.routing();
    if (config.routing->start && model.config) result.routing_start = Evaluator(open_start(path, open, model), config).routing();
  }
  if (config.drift)
    for (const auto& name : config.drift->dtypes) {
      log::info("text drift in ", name);
      if (name == result.dtype) {
        result.drift[name] = measure_drift(model, uint64_t(config.drift->seed));
        continue;
      }
      graft::OpenOptions other = open;
      other.dtype = graft::parse_dtype(name);
      other.with_codecs = other.check_identity = false;
      graft::GraftedModel again = graft::open_model(path, other);
      result.drift[name] = measure_drift(again, uint64_t(config.drift->seed));
    }
  return result;
}

}  // namespace moegraft::evaluate
