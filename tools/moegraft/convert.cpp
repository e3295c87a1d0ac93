// moegraft import, moegraft upcycle: bases from other formats and from dense models.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/convert/import_gguf.h"
#include "moegraft/convert/upcycle.h"

namespace moegraft::tools {
namespace {

using Json = nlohmann::ordered_json;

at::ScalarType parse_dtype(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float16") return at::kHalf;
  MOEGRAFT_CHECK_USAGE(name == "bfloat16", "--dtype must be float32, float16 or bfloat16, got ", name);
  return at::kBFloat16;
}

struct Import {
  std::string file, out, dtype = "bfloat16";
  bool json = false;
};

void import_command(const Import& o) {
  convert::ImportOptions options;
  options.dtype = parse_dtype(o.dtype);
  const auto r = convert::import_gguf(o.file, o.out, options);
  if (o.json) {
    std::cout << Json{{"dir", o.out}, {"architecture", r.architecture}, {"model_type", r.model_type}, {"parameters", r.parameters}, {"experts", r.experts}, {"tied", r.tied}, {"dtype", o.dtype}}.dump() << '\n';
    return;
  }
  log::info("wrote ", o.out, ": ", r.model_type, ", ", format_count(double(r.parameters)), " parameters", r.experts ? "" : "; dense: make it a mixture of experts with moegraft upcycle");
}

struct Upcycle {
  std::string dense, out, method = "virtual_groups";
  convert::UpcycleOptions options;
  bool json = false;
};

void upcycle_command(Upcycle o) {
  o.options.method = convert::parse_upcycle_method(o.method);
  const auto r = convert::upcycle(o.dense, o.out, o.options);
  if (o.json) {
    std::cout << Json{{"dir", o.out},           {"from", r.from},         {"to", r.to},
                      {"method", o.method},     {"experts", r.experts},   {"top_k", r.top_k},
                      {"expert_width", r.expert_width}, {"parameters", r.parameters}, {"dense_parameters", r.dense_parameters},
                      {"keeps_function", r.keeps_function}}.dump()
              << '\n';
    return;
  }
  log::info("wrote ", o.out, ": ", r.to, " with ", r.experts, " experts of ", r.expert_width, ", top ", r.top_k, "; ", format_count(double(r.parameters)), " parameters from ",
            format_count(double(r.dense_parameters)));
  if (r.keeps_function) log::info("its function is the dense model's");
  else log::warning("its function is not the dense model's: measure text before and after (moegraft eval --text), and train it before it is grafted");
}

}  // namespace

void add_import_command(CLI::App& app) {
  auto* command = app.add_subcommand("import", "A base from another format");
  command->require_subcommand(1);
  auto o = std::make_shared<Import>();
  auto* gguf = command->add_subcommand("gguf", "From a GGUF file (llama.cpp): weights, config, tokenizer and chat template as a Hugging Face directory");
  gguf->footer("Example:\n  moegraft import gguf SmolLM2-135M-Instruct.Q4_1.gguf -o models/smollm2");
  gguf->add_option("file", o->file, "The GGUF file (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K)")->required();
  gguf->add_option("-o,--out", o->out, "Folder to write; it must not exist yet")->required();
  gguf->add_option("--dtype", o->dtype, "float32 (a quantised file's values as they are), bfloat16 or float16")->capture_default_str();
  gguf->add_flag("--json", o->json, "Print a JSON object");
  gguf->callback([o] { import_command(*o); });
}

void add_upcycle_command(CLI::App& app) {
  auto o = std::make_shared<Upcycle>();
  auto* command = app.add_subcommand("upcycle", "A dense model (llama, mistral, qwen3) as a mixture of experts");
  command->footer(
      "Examples:\n  moegraft upcycle models/smollm2 -o models/smollm2-moe --shards 4 --clones 4     # the same function in 16 experts, top 4\n"
      "  moegraft upcycle models/smollm2 -o models/smollm2-8x --method clone --experts 8 --top-k 2");
  auto& u = o->options;
  command->add_option("dense", o->dense, "Hugging Face directory of the dense model")->required();
  command->add_option("-o,--out", o->out, "Folder to write; it must not exist yet")->required();
  command->add_option("--method", o->method, "virtual_groups and clone keep the model's function; split does not")->capture_default_str();
  command->add_option("--shards", u.shards, "virtual_groups: parts of the FFN, all of which are active")->capture_default_str();
  command->add_option("--clones", u.clones, "virtual_groups: copies of the FFN, one of which the router takes")->capture_default_str();
  command->add_option("--experts", u.experts, "clone, split: number of experts")->capture_default_str();
  command->add_option("--top-k", u.top_k, "clone, split: active experts")->capture_default_str();
  command->add_option("--noise", u.noise, "clone: normal noise, as a share of each matrix's standard deviation")->capture_default_str();
  command->add_option("--redraw", u.redraw, "clone: share of each expert's neurons that is drawn anew")->capture_default_str();
  command->add_flag("--contiguous", u.contiguous, "Deal neurons in runs instead of at random");
  command->add_option("--router-std", u.router_std, "Standard deviation of the router's entries")->capture_default_str();
  command->add_option("--seed", u.seed, "Seed of router, deal and noise")->capture_default_str();
  command->add_flag("--json", o->json, "Print a JSON object");
  command->callback([o] { upcycle_command(*o); });
}

}  // namespace moegraft::tools
