// moegraft upcycle: a dense model as a mixture of experts, and what that does to its text.
#include "libtorch.h"

#include <cmath>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/convert/upcycle.h"
#include "moegraft/data/prepare.h"
#include "moegraft/evaluate/likelihood.h"
#include "moegraft/io/staged_folder.h"
#include "moegraft/model/device.h"

namespace moegraft::tools {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  std::string dense, out, method = "virtual_groups", router;
  std::vector<std::string> text, eval_text;
  int64_t calibration_tokens = 4096, eval_tokens = 8192;
  convert::UpcycleOptions upcycle;
  bool json = false;
};

// Options of some methods alone: elsewhere they would be ignored in silence.
struct Applies {
  const char* option;
  std::vector<const char*> methods;
};
const std::vector<Applies> kApplies = {
    {"--shards", {"virtual_groups"}},
    {"--clones", {"virtual_groups"}},
    {"--experts", {"clone", "split", "cluster"}},
    {"--top-k", {"clone", "split", "cluster"}},
    {"--noise", {"clone"}},
    {"--redraw", {"clone"}},
    {"--contiguous", {"virtual_groups", "split"}},
    {"--shared", {"cluster"}},
};

void check_options(const CLI::App& command, const std::string& method) {
  for (const auto& [option, methods] : kApplies) {
    if (command.count(option) == 0) continue;
    const std::vector<std::string> names(methods.begin(), methods.end());
    MOEGRAFT_CHECK_USAGE(std::find(names.begin(), names.end(), method) != names.end(), option, " is for --method ",
                         join(names, " or "), ", got --method ", method);
  }
}

// Text as a stream, as a training on text sees it.
data::EvalStream open_text(const graft::GraftedModel& model, const fs::path& shards, int64_t tokens) {
  data::DataConfig rules;
  rules.packing = data::Packing::stream;
  const int64_t most = model.decoder->spec().max_positions;
  rules.sequence_length = most > 0 ? std::min<int64_t>(512, most) : 512;
  rules.tokens_per_step = std::max<int64_t>(rules.sequence_length, 2048);
  data::SourceConfig source;
  source.path = shards.string();
  return data::EvalStream({source}, rules, model.vocabulary, tokens);
}

struct Perplexity {
  double value = 0;
  int64_t tokens = 0;
};
Perplexity measure(const graft::GraftedModel& model, const fs::path& shards, int64_t tokens) {
  auto stream = open_text(model, shards, tokens);
  const auto likelihood = evaluate::measure_likelihood(model, stream);
  MOEGRAFT_CHECK(likelihood.labels_M[0] > 0, "the text holds nothing to predict");
  return {std::exp(likelihood.nll_M[0]), likelihood.labels_M[0]};
}

// The FFN inputs of every layer of a mixture of one expert, which meets all tokens in their order.
class LayerInputs : public model::SiteObserver {
 public:
  explicit LayerInputs(int64_t layers) : parts_(size_t(layers)) {}
  void observe_experts(int64_t layer, model::Site site, const at::Tensor& rows_RX, const std::vector<int64_t>&,
                       int64_t) override {
    if (site == model::Site::gate) parts_[size_t(layer)].push_back(rows_RX.detach().to(at::kCPU, at::kFloat).clone());
  }
  std::vector<at::Tensor> take() const {
    std::vector<at::Tensor> inputs;
    for (const auto& parts : parts_) inputs.push_back(at::cat(parts));
    return inputs;
  }

 private:
  std::vector<std::vector<at::Tensor>> parts_;
};
std::vector<at::Tensor> collect_inputs(const graft::GraftedModel& model, const fs::path& shards, int64_t tokens) {
  const at::NoGradGuard no_grad;
  LayerInputs inputs(model.decoder->spec().num_layers);
  model::ForwardOptions options;
  options.sites = &inputs;
  auto stream = open_text(model, shards, tokens);
  while (const auto batch = stream.next()) model.decoder->forward(model::to_device(*batch, model.device()), options);
  return inputs.take();
}

void prepare_text(const Options& o, const std::vector<std::string>& files, const fs::path& to) {
  data::ShardOptions shards;
  shards.texts.assign(files.begin(), files.end());
  shards.tokenizer = o.dense;
  shards.output = to;
  data::prepare_shards(shards);
}

// What was measured on text; `dense` and `upcycled` on the same tokens.
struct Measured {
  Perplexity dense, upcycled;
};

std::string line_of(const Options& o, const Measured& m, bool keeps) {
  char line[160];
  std::snprintf(line, sizeof line, "%s: perplexity %.4g -> %.4g on %lld tokens of ", o.method.c_str(), m.dense.value,
                m.upcycled.value, static_cast<long long>(m.dense.tokens));
  const auto& files = o.eval_text.empty() ? o.text : o.eval_text;
  return line + join(files, ", ") +
         (needs_inputs(o.upcycle) && o.eval_text.empty() ? ", the calibration text itself" : "") +
         (keeps ? "" : " (this method loses text ability; a run to recover it: configs/recovery.yaml)");
}

// The dense model on text. No decoder runs dense layers, but one expert that is always chosen is the dense FFN.
class DenseOnText {
 public:
  explicit DenseOnText(const Options& o) : o_(o), scratch_(beside(o.out)) {
    convert::upcycle(o.dense, scratch_.path() / "one", {.shards = 1, .clones = 1});
    if (!o.text.empty()) prepare_text(o, o.text, scratch_.path() / "text");
    if (!o.eval_text.empty()) prepare_text(o, o.eval_text, eval());
    model_.emplace(graft::open_model(scratch_.path() / "one"));
    measured_.dense = measure(*model_, eval(), o.eval_tokens);
  }
  // Once; the dense model has done its part then.
  std::vector<at::Tensor> inputs() {
    auto inputs = collect_inputs(*model_, scratch_.path() / "text", o_.calibration_tokens);
    model_.reset();
    return inputs;
  }
  Measured compare(const fs::path& upcycled) {
    model_.reset();
    measured_.upcycled = measure(graft::open_model(upcycled), eval(), o_.eval_tokens);
    return measured_;
  }

 private:
  static fs::path beside(const std::string& out) {
    const fs::path path = fs::path(out).lexically_normal(), folder = path.has_filename() ? path : path.parent_path();
    return folder.string() + ".text";
  }
  fs::path eval() const { return scratch_.path() / (o_.eval_text.empty() ? "text" : "eval"); }

  const Options& o_;
  io::StagedFolder scratch_;
  std::optional<graft::GraftedModel> model_;
  Measured measured_;
};

void run(Options o, const CLI::App& command) {
  o.upcycle.method = convert::parse_upcycle_method(o.method);
  if (!o.router.empty()) o.upcycle.router = convert::parse_upcycle_router(o.router);
  check_options(command, o.method);
  MOEGRAFT_CHECK_USAGE(std::isfinite(o.upcycle.router_std) && o.upcycle.router_std >= 0 && o.upcycle.router_std <= 100,
                       "--router-std must be in [0, 100], got ", o.upcycle.router_std);
  MOEGRAFT_CHECK_USAGE(std::isfinite(o.upcycle.noise) && o.upcycle.noise >= 0 && o.upcycle.noise <= 10,
                       "--noise must be in [0, 10], got ", o.upcycle.noise);
  for (const auto* files : {&o.text, &o.eval_text})
    for (const auto& file : *files)
      MOEGRAFT_CHECK_USAGE(fs::is_regular_file(file) && fs::file_size(file) > 0, "text file ", file,
                           fs::exists(file) ? " is empty or no file" : " not found");
  std::optional<DenseOnText> text;
  if (!o.text.empty()) o.upcycle.inputs = [&] { return text.emplace(o).inputs(); };
  const auto r = convert::upcycle(o.dense, o.out, o.upcycle);
  if (!text && !(o.text.empty() && o.eval_text.empty())) text.emplace(o);
  const auto measured = text ? std::optional(text->compare(o.out)) : std::nullopt;
  if (o.json) {
    Json out{{"dir", o.out},
             {"from", r.from},
             {"to", r.to},
             {"method", o.method},
             {"experts", r.experts},
             {"top_k", r.top_k},
             {"expert_width", r.expert_width},
             {"parameters", r.parameters},
             {"dense_parameters", r.dense_parameters},
             {"keeps_function", r.keeps_function}};
    if (measured)
      out["perplexity"] = {
          {"dense", measured->dense.value}, {"upcycled", measured->upcycled.value}, {"tokens", measured->dense.tokens}};
    std::cout << out.dump() << '\n';
    return;
  }
  log::info("wrote ", o.out, ": ", r.to, " with ", r.experts, r.experts == 1 ? " expert of " : " experts of ",
            r.expert_width, ", top ", r.top_k, "; ", format_count(double(r.parameters)), " parameters from ",
            format_count(double(r.dense_parameters)));
  if (measured && r.keeps_function)
    log::info(line_of(o, *measured, true));
  else if (measured)
    log::warning(line_of(o, *measured, false));
  else if (r.keeps_function)
    log::info("its function is the dense model's");
  else
    log::warning(
        "its function is not the dense model's: --text FILE measures what that costs; configs/recovery.yaml is a run "
        "that wins text ability back");
}

}  // namespace

void add_upcycle_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  auto* command = app.add_subcommand("upcycle", "A dense model (llama, mistral, qwen3) as a mixture of experts");
  command->footer(
      "Examples:\n  moegraft upcycle models/smollm2 -o models/smollm2-moe --shards 4 --clones 4     # the same "
      "function in 16 experts, top 4\n"
      "  moegraft upcycle models/smollm2 -o models/smollm2-8x --method clone --experts 8 --top-k 2\n"
      "  moegraft upcycle models/smollm2 -o models/smollm2-parts --method cluster --experts 8 --top-k 6 --text "
      "notes.txt --eval-text heldout.txt");
  auto& u = o->upcycle;
  command->add_option("dense", o->dense, "Hugging Face directory of the dense model")->required();
  command->add_option("-o,--out", o->out, "Folder to write; it must not exist yet")->required();
  command
      ->add_option("--method", o->method,
                   "virtual_groups and clone keep the model's function; cluster and split do not")
      ->capture_default_str();
  command->add_option("--shards", u.shards, "virtual_groups: parts of the FFN, all of which are active")
      ->capture_default_str();
  command->add_option("--clones", u.clones, "virtual_groups: copies of the FFN, one of which the router takes")
      ->capture_default_str();
  command->add_option("--experts", u.experts, "clone, split, cluster: number of experts")->capture_default_str();
  command->add_option("--top-k", u.top_k, "clone, split, cluster: active experts")->capture_default_str();
  command
      ->add_option("--shared", u.shared, "cluster: share of the neurons, the most active ones, that every expert holds")
      ->capture_default_str();
  command->add_option("--noise", u.noise, "clone: normal noise, as a share of each matrix's standard deviation")
      ->capture_default_str();
  command->add_option("--redraw", u.redraw, "clone: share of each expert's neurons that is drawn anew")
      ->capture_default_str();
  command->add_flag("--contiguous", u.contiguous, "Deal neurons in runs instead of at random");
  command->add_option("--router", o->router,
                      "random, kmeans (balanced clusters of the layers' inputs) or, for cluster, analytic (default: "
                      "analytic for cluster, else random)");
  command
      ->add_option(
          "--router-std", u.router_std,
          "Standard deviation of a random router's entries; a kmeans router's logits vary as much as such a one's")
      ->capture_default_str();
  command->add_option("--seed", u.seed, "Seed of router, deal, clusters and noise")->capture_default_str();
  command
      ->add_option("--text", o->text,
                   "Text files, a document a line: perplexity before and after is measured on them; cluster and kmeans "
                   "are calibrated on them (repeatable)")
      ->allow_extra_args(false);
  command
      ->add_option("--eval-text", o->eval_text,
                   "Text files to measure on instead, so that it is not the calibration text (repeatable)")
      ->allow_extra_args(false);
  command
      ->add_option("--calibration-tokens", o->calibration_tokens,
                   "Tokens to calibrate on; inputs of every layer are kept in memory")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 32))
      ->capture_default_str();
  command->add_option("--eval-tokens", o->eval_tokens, "Tokens to measure on")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_flag("--json", o->json, "Print a JSON object");
  command->callback([o, command] { run(*o, *command); });
}

}  // namespace moegraft::tools
