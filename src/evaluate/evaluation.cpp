#include "moegraft/evaluate/evaluation.h"

#include <algorithm>
#include <map>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/codec/pictures.h"
#include "moegraft/data/fingerprints.h"
#include "moegraft/data/stream.h"
#include "moegraft/evaluate/baselines.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/evaluate/likelihood_ranking.h"
#include "moegraft/generate/prompt.h"
#include "moegraft/io/files.h"
#include "moegraft/io/fingerprint.h"
#include "moegraft/io/image.h"
#include "moegraft/io/rows.h"
#include "moegraft/run/identity.h"
#include "gallery.h"
#include "output.h"

namespace moegraft::evaluate {
namespace {

namespace fs = std::filesystem;
using io::Json;

// One model and what of its run the measures need.
class Evaluator {
 public:
  Evaluator(graft::GraftedModel model, const EvalConfig& config) : config_(config), model_(std::move(model)) {
    if (model_.config) rules_ = model_.config->data;
    const int64_t most = model_.decoder->spec().max_positions;
    if (config.sequence_length > 0) rules_.sequence_length = config.sequence_length;
    if (most > 0) rules_.sequence_length = std::min(rules_.sequence_length, most);
    rules_.tokens_per_step = std::max<int64_t>(rules_.sequence_length, 2048);
    rules_.packing = data::Packing::documents;
  }

  graft::GraftedModel& model() { return model_; }
  int64_t sequence_length() const { return rules_.sequence_length; }
  const model::ModalityTokens& tokens() const { return generate::find_modality(model_, config_.modality); }

  TextResult text() {
    data::DataConfig rules = rules_;
    rules.packing = config_.text->packing;
    data::EvalStream stream(sources(config_.text->shards), rules, model_.vocabulary, config_.text->max_tokens);
    const Likelihood grafted = measure_likelihood(model_, stream);
    MOEGRAFT_CHECK(grafted.labels_M[0] > 0, "text.shards: no text to predict in ", config_.text->shards);
    TextResult result{grafted.labels_M[0], config::name_of(rules.packing), rules.sequence_length, grafted.nll_M[0], {}};
    if (model_.is_graft()) {
      const Detached base(model_);
      result.base_nll = measure_likelihood(model_, stream).nll_M[0];
    }
    return result;
  }

  ImageResult image(const ImageSection& section) {
    const auto items = read_captioned_items(section.shards, model_.vocabulary, tokens(), section.max_items);
    ImageResult result{measure_captions(model_, tokens(), items, rules_, 17), {}};
    const auto shards = unigram_shards();
    if (shards.empty()) return result;
    if (!unigram_) unigram_ = count_codes(shards, model_.vocabulary, tokens());
    result.unigram = unigram_->nll(items);
    return result;
  }

  std::vector<std::string> unigram_shards() const {
    std::vector<std::string> shards = config_.unigram;
    if (shards.empty() && model_.config)
      for (const auto& source : model_.config->data.train) shards.push_back(source.path);
    return shards;
  }
  std::vector<std::string> routed_shards() const {
    std::vector<std::string> shards = config_.text->shards;
    for (const auto& section : config_.images) shards.push_back(section.shards);
    return shards;
  }

  routing::RoutingReport routing() {
    std::vector<std::string> names{"text"};
    for (const auto& m : model_.vocabulary.modalities) names.push_back(m.name);
    const auto& spec = model_.decoder->spec();
    routing::RoutingStats stats(spec.num_layers, spec.num_experts, names, model_.device());
    data::EvalStream stream(sources(routed_shards()), rules_, model_.vocabulary, config_.routing->max_tokens);
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

}  // namespace

std::vector<std::string> quantize_choices() {
  std::vector<std::string> names{"auto"};
  for (const auto& row : model::kQuantizations) names.emplace_back(row.name);
  return names;
}

namespace {

graft::OpenOptions open_options(const EvalConfig& config) {
  graft::OpenOptions open;
  if (config.dtype != "auto") open.dtype = graft::parse_dtype(config.dtype);
  if (config.quantize != "auto") open.quantize = config::parse_choice<model::Quantize>("quantize", config.quantize);
  open.device = config.device;
  open.checkpoint = config.checkpoint;
  return open;
}

// The run before its first step: checkpoint 0 where it was kept, else made again from its config and seed.
graft::GraftedModel open_start(const fs::path& path, graft::OpenOptions open, const graft::GraftedModel& now) {
  open.checkpoint = "0", open.check_identity = false;
  if (fs::is_directory(path / "checkpoints" / checkpoint::step_name(0))) return graft::open_model(path, open);
  run::RunConfig config = *now.config;
  config.model.device = now.device().is_cuda() ? config::Device::cuda : config::Device::cpu;
  return graft::build_model(config);
}

bool asks_for_nothing(const EvalConfig& c) {
  return !c.text && c.images.empty() && c.codec.empty() && c.retrieval.empty() && c.ranking.empty() && !c.drift &&
         !c.routing;
}

void check_shards(const graft::GraftedModel& model, const EvalConfig& config) {
  std::vector<std::string> sources = config.text ? config.text->shards : std::vector<std::string>();
  const std::string own = !model.config && model.tokenizer ? data::tokenizer_fingerprint(*model.tokenizer)
                                                           : "";  // of a plain model; a run has noted its own
  for (const auto& path : sources) {
    const data::ShardSet shards(path);
    MOEGRAFT_CHECK(shards.schema().modalities.size() == 1, "text.shards: ", path,
                   " holds other modalities too; give shards of text alone (captioned pictures belong to `images`)");
    const auto with = shards.fingerprints().find("tokenizer");
    MOEGRAFT_CHECK(own.empty() || with == shards.fingerprints().end() || with->second == own, "text.shards: ", path,
                   " was made with another tokenizer than the model's (fingerprint ", with->second, ", the model's ",
                   own, "): prepare it again with --tokenizer ", model.path.string());
  }
  if (!model.config) return;
  for (const auto& section : config.images) sources.push_back(section.shards);
  run::check_shards(sources, run::recorded_fingerprints(model.path),
                    *model.config);  // these were compared when the run was opened
}

// What would otherwise be found out after hours of other sections.
void check_files(const EvalConfig& config) {
  const auto readable = [](const std::string& path, const char* of) {
    MOEGRAFT_CHECK(path.empty() || fs::exists(path) || io::is_file_pattern(path), of, ": ", path, " does not exist");
  };
  for (const auto& s : config.codec) readable(s.pictures, "codec.pictures");
  for (const auto& s : config.ranking) readable(s.manifest, "ranking.manifest");
  if (config.baselines) readable(config.baselines->manifest, "baselines.manifest");
  for (const auto& s : config.retrieval) {
    readable(s.manifest, "retrieval.manifest"), readable(s.candidates, "retrieval.candidates");
    MOEGRAFT_CHECK_USAGE(!fs::is_directory(s.sheet), "retrieval.sheet: ", s.sheet,
                         " is a folder; give a file, such as sheet.png");
    if (const fs::path folder = fs::path(s.sheet).parent_path(); !folder.empty()) fs::create_directories(folder);
  }
}

std::string dtype_name(at::ScalarType dtype) { return dtype == at::kFloat ? "float32" : "bfloat16"; }

// What a run was set up with: its held-out data.
void take_from_run(EvalConfig& config, const graft::GraftedModel& model) {
  MOEGRAFT_CHECK_USAGE(model.config.has_value(),
                       "nothing to measure: give -c eval.yaml, --text, --images, --retrieval, --codec or --drift");
  for (const auto& source : model.config->data.eval) {
    const data::ShardSet shards(source.path);
    if (shards.schema().modalities.size() == 1) {
      if (!config.text) config.text.emplace();
      config.text->shards.push_back(source.path);
    } else {
      config.images.push_back({fs::path(source.path).filename().string() +
                                   (config.images.empty() ? "" : "-" + std::to_string(config.images.size())),
                               source.path});
    }
  }
  if (model.is_graft()) config.drift.emplace();
  MOEGRAFT_CHECK_USAGE(!asks_for_nothing(config),
                       "nothing to measure: the run's data.eval is empty; give -c eval.yaml, --text or --images");
}

// What is measured together, kept together and printed together.
struct Section {
  std::string key, name;          // its place in the JSON: [key][name], or [key] without a name
  std::string settings;           // what decides the result besides model and data
  std::vector<std::string> data;  // shards and manifests that it reads
  std::function<Json()> measure;
  std::string leaves = {};  // a file that measuring it makes
  std::string label() const { return name.empty() ? key : key + "." + name; }
};

Json measure_drift_in(const std::string& dtype, const fs::path& path, const EvalConfig& config,
                      graft::GraftedModel& model) {
  const uint64_t seed(config.drift->seed);
  if (dtype == dtype_name(model.decoder->dtype())) return to_json(measure_drift(model, seed));
  graft::OpenOptions other = open_options(config);
  other.dtype = graft::parse_dtype(dtype);
  other.with_codecs = other.check_identity = false;
  graft::GraftedModel again = graft::open_model(path, other);
  return to_json(measure_drift(again, seed));
}

Json measure_routing(const fs::path& path, const EvalConfig& config, Evaluator& evaluator) {
  Json j{{"now", to_json(evaluator.routing())}};
  if (config.routing->start && evaluator.model().config)
    j["start"] = to_json(Evaluator(open_start(path, open_options(config), evaluator.model()), config).routing());
  return j;
}

// In the order in which they are measured. Refers to its arguments.
std::vector<Section> list_sections(const fs::path& path, const EvalConfig& config, Evaluator& evaluator) {
  std::vector<Section> sections;
  if (config.text)
    sections.push_back(
        {"text", "", config::dump(*config.text), config.text->shards, [&] { return to_json(evaluator.text()); }});
  for (const auto& s : config.images) {
    std::vector<std::string> data = evaluator.unigram_shards();
    data.push_back(s.shards);
    sections.push_back({"images", s.name, config::dump(s), data, [&] { return to_json(evaluator.image(s)); }});
  }
  for (const auto& s : config.codec)
    sections.push_back({"codec", s.name, config::dump(s), {s.pictures}, [&] {
                          return to_json(measure_codec(evaluator.model(), evaluator.tokens(), s));
                        }});
  for (const auto& s : config.retrieval)
    sections.push_back({"retrieval",
                        s.name,
                        config::dump(s),
                        {s.manifest, s.candidates},
                        [&] {
                          Json j = to_json(measure_retrieval(evaluator.model(), evaluator.tokens(), s));
                          if (!s.sheet.empty()) j["sheet"] = s.sheet;
                          return j;
                        },
                        s.sheet});
  if (config.baselines) {
    std::string settings = config::dump(*config.baselines);
    std::vector<std::string> data{config.baselines->manifest};
    for (const auto& s : config.retrieval) {
      settings += detail::concat(' ', s.name, ' ', s.n, ' ', s.seed);
      data.insert(data.end(), {s.manifest, s.candidates});
    }
    sections.push_back({"baselines", "", settings, data, [&] {
                          return to_json(measure_baselines(evaluator.model(), evaluator.tokens(), *config.baselines,
                                                           config.retrieval));
                        }});
  }
  for (const auto& s : config.ranking)
    sections.push_back({"ranking", s.name, config::dump(s), {s.manifest}, [&] {
                          return to_json(rank_likelihoods(evaluator.model(), evaluator.tokens(), s));
                        }});
  if (config.routing)
    sections.push_back({"routing", "", config::dump(*config.routing), evaluator.routed_shards(),
                        [&] { return measure_routing(path, config, evaluator); }});
  if (config.drift)
    for (const auto& dtype : config.drift->dtypes)
      sections.push_back({"drift", dtype, config::dump(*config.drift), {}, [&] {
                            return measure_drift_in(dtype, path, config, evaluator.model());
                          }});
  return sections;
}

// Everything outside its section that a result depends on: parameters, what they were grafted onto, and how they are
// run.
std::string identify(const graft::GraftedModel& model, const EvalConfig& config, int64_t sequence_length) {
  std::string text = detail::concat(model.step, ' ', dtype_name(model.decoder->dtype()), ' ', model.device().str(), ' ',
                                    sequence_length, ' ', config.modality);
  if (!model.config) return text + data::base_fingerprint(model.path);
  for (const auto& [name, fingerprint] : run::recorded_fingerprints(model.path)) text += ' ' + name + ' ' + fingerprint;
  for (const auto& [name, tensor] : checkpoint::parameter_tensors(*model.registry)) {
    const at::Tensor host = tensor.to(at::kCPU).contiguous();
    text += ' ' + name + ' ' + io::checksum_hex({static_cast<const char*>(host.const_data_ptr()), host.nbytes()});
  }
  return text;
}

// A file that may be large, by size and time of change: pictures are exchanged, not edited in their place.
std::string stamp_of(const std::string& file) {
  std::error_code error;
  const auto bytes = fs::file_size(file, error);
  if (error) return file + " none\n";
  return detail::concat(file, ' ', bytes, ' ', fs::last_write_time(file, error).time_since_epoch().count(), '\n');
}

// What is read of a data set: its rows, and the files that they name by their stamps. Empty for what has none, or
// cannot be read: that is told when it is measured.
std::string rows_of(const fs::path& path) {
  std::string text;
  try {
    io::read_rows(
        path,
        [&](const io::Row& row) {
          text += row.json.dump(-1, ' ', false, Json::error_handler_t::replace);
          const Json values = row.json.flatten();  // whatever its shape
          for (const auto& value : values) {
            if (row.folder.empty() || !value.is_string() || row.pictures.contains(value.get_ref<const std::string&>()))
              continue;
            std::error_code none;  // a caption is no name of a file
            if (const fs::path file = row.folder / value.get_ref<const std::string&>(); fs::is_regular_file(file, none))
              text += stamp_of(file.string());
          }
          text = io::checksum_hex(text);
        },
        [](const std::string&) {});
  } catch (const UserError&) {}
  return text;
}

// Pictures in a folder, which `codec.pictures` reads without rows.
std::string pictures_in(const fs::path& folder) {
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (io::has_picture_extension(entry.path().filename().string())) files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  std::string text;
  for (const auto& file : files) text += stamp_of(file);
  return text;
}

// Shards, manifests, tars, Parquet and Arrow files by content, and the picture files that these name by their stamps.
std::string content_of(const std::string& path) {
  if (path.empty()) return "";
  std::string text = io::fingerprint_rows(path);
  if (text.empty())
    text = io::fingerprint_folder(
        path, [](const std::string& name) { return name.ends_with(".safetensors") || name.starts_with("metadata."); });
  if (fs::is_directory(path))
    text += pictures_in(path);
  else if (path.ends_with(".safetensors") || io::has_picture_extension(path))
    return text;
  return io::checksum_hex(text + rows_of(path));
}

// The JSON in `output` as an earlier call left it; an empty object where there is none.
Json read_earlier(const fs::path& output) {
  MOEGRAFT_CHECK_USAGE(!fs::is_directory(output), output.string(), " is a folder; give a file, such as ",
                       (output / "eval.json").string());
  if (!fs::exists(output)) {
    if (output.has_parent_path()) fs::create_directories(output.parent_path());
    return Json::object();
  }
  Json earlier = io::read_json(output);
  MOEGRAFT_CHECK(
      earlier.is_object() && earlier.value("sections", Json()).is_object() && earlier.value("of", Json()).is_string(),
      output.string(), " is no result of moegraft eval; give another file or remove it");
  return earlier;
}

std::string identify(const Section& s, const std::string& whose) {
  std::string text = whose + ' ' + s.settings;
  for (const auto& path : s.data) text += ' ' + content_of(path);
  return io::checksum_hex(text);
}

// Whether a result has all that its rows are made of: files of results are edited by hand.
bool is_whole(const Section& s, const Json& result) {
  try {
    table_rows(s.key, s.name, result);
    return true;
  } catch (const Json::exception&) {
    log::warning(s.label(), " of the earlier results is not as moegraft eval writes it, and is measured again");
    return false;
  }
}

// A section's result of an earlier call, when it would be the same today; else null.
const Json* find_earlier(const Json& earlier, const Section& s, const std::string& identity) {
  const Json* at = &earlier;
  for (const std::string& key :
       s.name.empty() ? std::vector<std::string>{s.key} : std::vector<std::string>{s.key, s.name}) {
    if (!at->is_object() || !at->contains(key)) return nullptr;
    at = &at->at(key);
  }
  const auto sections = earlier.find("sections");
  const bool same =
      sections != earlier.end() && sections->is_object() && sections->value(s.label(), Json()) == identity;
  return same && (s.leaves.empty() || fs::exists(s.leaves)) && is_whole(s, *at) ? at : nullptr;
}

// Takes over what `earlier` holds of the same model that this call does not ask for.
void keep_others(Json& result, const Json& earlier, const std::vector<Section>& sections) {
  for (const auto& [label, identity] : earlier.at("sections").items()) {
    if (std::any_of(sections.begin(), sections.end(), [&](const Section& s) { return s.label() == label; })) continue;
    const size_t dot = label.find('.');
    const std::string key = label.substr(0, dot);
    if (!earlier.contains(key) || !earlier.at(key).is_object()) continue;
    if (dot == std::string::npos)
      result[key] = earlier.at(key);
    else
      result[key][label.substr(dot + 1)] = earlier.at(key).value(label.substr(dot + 1), Json());
    result["sections"][label] = identity;
  }
}

Json& place_of(Json& j, const Section& s) { return s.name.empty() ? j[s.key] : j[s.key][s.name]; }

}  // namespace

codec::Quality measure_codec(const graft::GraftedModel& model, const model::ModalityTokens& tokens,
                             const CodecSection& section) {
  const codec::ImageCodec& codec = codec_of(model, tokens);
  const auto pictures = codec::load_pictures(section.pictures, codec.image_size(), codec.fit());
  const int64_t total = pictures.pixels_N3HW.size(0), count = std::min(total, section.max_items);
  const at::Tensor chosen = (at::arange(count, at::kLong) * total).div(count, "floor");
  return codec::measure(codec, pictures.pixels_N3HW.index_select(0, chosen));
}

std::string evaluate_model(const fs::path& path, EvalConfig config, const EvaluationOptions& options) {
  const at::NoGradGuard no_grad;
  const bool keep = !options.output.empty();
  const Json earlier = keep ? read_earlier(options.output) : Json::object();
  graft::GraftedModel opened = graft::open_model(path, open_options(config));
  if (asks_for_nothing(config)) take_from_run(config, opened);
  config.validate("");
  const bool needs_images = !config.images.empty() || !config.codec.empty() || !config.retrieval.empty() ||
                            !config.ranking.empty() || config.routing;
  MOEGRAFT_CHECK_USAGE(opened.is_graft() || (!needs_images && !config.drift), path.string(),
                       " is a plain text model: only text perplexity can be measured");
  check_shards(opened, config);
  check_files(config);

  Evaluator evaluator(std::move(opened), config);
  const graft::GraftedModel& model = evaluator.model();
  Json result{{"model", path.string()},
              {"dtype", dtype_name(model.decoder->dtype())},
              {"device", model.device().str()},
              {"step", model.step}};
  const auto sections = list_sections(path, config, evaluator);
  std::map<std::string, std::string> identities;  // by label
  std::vector<std::string> kept;
  if (keep) {
    const std::string whose = identify(model, config, evaluator.sequence_length());
    result["of"] = io::checksum_hex(whose);
    result["sections"] = Json::object();
    if (earlier.contains("of") && earlier.at("of") == result["of"])
      keep_others(result, earlier, sections);
    else if (!earlier.empty())
      log::warning(
          options.output.string(),
          " holds results of other parameters, or of another dtype, device or sequence length, which are replaced");
    for (const auto& s : sections) {
      const std::string identity = identities[s.label()] = identify(s, whose);
      const Json* found = find_earlier(earlier, s, identity);
      if (!found) continue;
      place_of(result, s) = *found;
      result["sections"][s.label()] = identity;
      kept.push_back(s.label());
    }
    if (!kept.empty()) log::info(options.output.string(), " holds these already, which are kept: ", join(kept, ", "));
  }
  if (options.on_rows)
    options.on_rows(table_row(path.string(), "step " + std::to_string(model.step),
                              result["dtype"].get<std::string>() + " on " + model.device().str()));
  for (const auto& s : sections) {
    if (std::find(kept.begin(), kept.end(), s.label()) == kept.end()) {
      log::info("measuring ", s.label());
      place_of(result, s) = s.measure();
      if (keep) {
        result["sections"][s.label()] = identities.at(s.label());
        io::write_json(options.output, result);
      }
    }
    if (options.on_rows) options.on_rows(table_rows(s.key, s.name, place_of(result, s)));
  }
  return result.dump(-1, ' ', false, Json::error_handler_t::replace);  // names of files need not be UTF-8
}

}  // namespace moegraft::evaluate
