// moegraft eval: the measures of a run or model.
#include <filesystem>
#include <iostream>
#include <memory>
#include <tuple>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/config/config.h"
#include "moegraft/evaluate/evaluation.h"

namespace moegraft::tools {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string model, config, checkpoint, dtype, quantize, device, sheet, candidates, baselines, output;
  std::vector<std::string> set, text, images, codec, retrieval, ranking;
  int64_t n = 0, max_items = 0;
  double temperature = -1;
  bool drift = false, routing = false, json = false;
};

// "popular" for data/images/popular, "train" for data/emoji/train.jsonl; made distinct by its place.
template <class Sections>
std::string name_of(const std::string& path, const Sections& sections) {
  fs::path p = fs::path(path).lexically_normal();
  if (p.filename().empty()) p = p.parent_path();
  std::string name = p.stem().string();
  for (const auto& s : sections)
    if (s.name == name) return name + "-" + std::to_string(sections.size());
  return name;
}

evaluate::EvalConfig read_config(const Options& o) {
  auto c = o.config.empty() ? config::parse<evaluate::EvalConfig>(config::Document::from_string("{}", o.set, "--set"))
                            : config::parse<evaluate::EvalConfig>(config::Document::from_file(o.config, o.set));
  if (!o.checkpoint.empty()) c.checkpoint = o.checkpoint;
  if (!o.dtype.empty()) c.dtype = o.dtype == "bf16" ? "bfloat16" : o.dtype;
  if (!o.quantize.empty())
    c.quantize = config::name_of(config::parse_choice<model::Quantize>("--quantize", o.quantize));
  if (!o.device.empty()) c.device = config::parse_choice<config::Device>("--device", o.device);
  if (!o.text.empty()) {
    if (!c.text) c.text.emplace();
    c.text->shards = o.text;
  }
  for (const auto& path : o.images) c.images.push_back({name_of(path, c.images), path});
  for (const auto& path : o.codec) c.codec.push_back({name_of(path, c.codec), path});
  MOEGRAFT_CHECK_USAGE(o.sheet.empty() || o.retrieval.size() == 1, "--sheet needs exactly one --retrieval, got ",
                       o.retrieval.size());
  const bool draws = !o.retrieval.empty() || !c.retrieval.empty(),
             asks = draws || !o.ranking.empty() || !c.ranking.empty();
  for (const auto& [given, option, needed, what] : {std::tuple(o.n > 0, "--n", asks, "--retrieval or --ranking"),
                                                    {o.temperature >= 0, "--temperature", draws, "--retrieval"},
                                                    {!o.candidates.empty(), "--candidates", draws, "--retrieval"}})
    MOEGRAFT_CHECK_USAGE(!given || needed, option, " is for ", what, ": give that too");
  for (const auto& path : o.retrieval) {
    evaluate::RetrievalSection r;
    r.name = name_of(path, c.retrieval);
    r.manifest = path;
    r.sheet = o.sheet;
    c.retrieval.push_back(r);
  }
  for (const auto& path : o.ranking) {
    evaluate::RankingSection r;
    r.name = name_of(path, c.ranking);
    r.manifest = path;
    c.ranking.push_back(r);
  }
  if (!o.baselines.empty()) {
    if (!c.baselines) c.baselines.emplace();
    c.baselines->manifest = o.baselines;
  }
  for (auto& r : c.retrieval) {
    if (o.n > 0) r.n = o.n;
    if (o.temperature >= 0) r.temperature = o.temperature;
    if (!o.candidates.empty()) r.candidates = o.candidates;
  }
  if (o.n > 0)
    for (auto& r : c.ranking) r.n = o.n;
  if (o.max_items > 0)
    for (auto& i : c.images) i.max_items = o.max_items;
  if (o.drift && !c.drift) c.drift.emplace();
  if (o.routing && !c.routing) c.routing.emplace();
  c.validate("");
  return c;
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* cmd = app.add_subcommand("eval",
                                     "Text perplexity and drift, likelihood of pictures, codec quality, prompt "
                                     "retrieval, likelihood ranking, baselines, routing");
  cmd->add_option("model", o->model, "Run or Hugging Face directory")->required();
  cmd->add_option("-c,--config", o->config,
                  "YAML file of what to measure (moegraft config eval lists its keys); nothing at all on a run: its "
                  "data.eval and the drift");
  cmd->add_option("--set", o->set, "Override a key of the YAML (repeatable)")->take_all()->allow_extra_args(false);
  cmd->add_option("--text", o->text,
                  "Text shards (several: after the model): perplexity, of the graft and of its base");
  cmd->add_option("--images", o->images,
                  "Shards of captioned pictures: likelihood with true, dropped and shuffled captions");
  cmd->add_option("--codec", o->codec, "Pictures (manifest or folder): how well the codec reproduces them");
  cmd->add_option("--retrieval", o->retrieval, "Manifest: draw from its captions, look for the nearest real picture");
  cmd->add_option("--ranking", o->ranking,
                  "Manifest: which of its captions is likeliest for a picture, which picture for a caption");
  cmd->add_option(
      "--baselines", o->baselines,
      "Manifest of the training pictures: how far linear regression from captions gets on each --retrieval");
  cmd->add_option("--candidates", o->candidates, "Manifest of further pictures to look among");
  cmd->add_option("--n", o->n, "Prompts of each retrieval and ranking")->check(positive());
  cmd->add_option("--temperature", o->temperature, "Of the retrieval's drawings; 0: the likeliest codes")
      ->check(not_negative());
  cmd->add_option("--sheet", o->sheet, "Picture to write: drawn beside original");
  cmd->add_option("--max-items", o->max_items, "Pictures of each --images")
      ->check(CLI::Range(int64_t{2}, int64_t{1000000000}));
  cmd->add_flag("--drift", o->drift, "Text logits of the graft against its base, in float32 and bfloat16");
  cmd->add_flag("--routing", o->routing,
                "Routing of text against pictures, now and at the start (needs --text and --images)");
  cmd->add_option("--checkpoint", o->checkpoint, "latest, best, a step or a directory (runs)");
  cmd->add_option("--dtype", o->dtype, "float32 or bfloat16 (default: the run's)")
      ->check(CLI::IsMember({"float32", "bfloat16", "bf16"}));
  cmd->add_option("--quantize", o->quantize, "How the base's matrices are stored: none or q8_0 (default: the run's)");
  cmd->add_option("--device", o->device, "auto, cpu or cuda")->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  cmd->add_option("-o,--output", o->output,
                  "File that the JSON is written to after every section; what it holds already of the same parameters, "
                  "settings and data is kept");
  cmd->add_flag("--json", o->json, "One JSON object on stdout at the end, instead of the table");
  cmd->footer(
      "Examples:\n  moegraft eval runs/emoji -c configs/quickstart/eval.yaml -o runs/emoji/eval.json\n"
      "  moegraft eval runs/emoji --retrieval data/emoji/popular.jsonl --n 120 --sheet sheet.png --drift\n"
      "  moegraft eval models/base --text data/text/eval data/text/other");
  cmd->callback([o] {
    evaluate::EvaluationOptions options{o->output, {}};
    if (!o->json) options.on_rows = [](const std::string& rows) { std::cout << rows << std::flush; };
    const std::string json = evaluate::evaluate_model(o->model, read_config(*o), options);
    if (o->json) std::cout << json << std::endl;
  });
}

}  // namespace moegraft::tools
