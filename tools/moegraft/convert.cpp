// moegraft import: bases from other formats.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/convert/import_gguf.h"

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
    std::cout << Json{{"dir", o.out},
                      {"architecture", r.architecture},
                      {"model_type", r.model_type},
                      {"parameters", r.parameters},
                      {"experts", r.experts},
                      {"tied", r.tied},
                      {"dtype", o.dtype}}
                     .dump()
              << '\n';
    return;
  }
  log::info("wrote ", o.out, ": ", r.model_type, ", ", format_count(double(r.parameters)), " parameters",
            r.experts ? "" : "; dense: make it a mixture of experts with moegraft upcycle");
}

}  // namespace

void add_import_command(CLI::App& app) {
  auto* command = app.add_subcommand("import", "A base from another format");
  command->require_subcommand(1);
  auto o = std::make_shared<Import>();
  auto* gguf = command->add_subcommand(
      "gguf", "From a GGUF file (llama.cpp): weights, config, tokenizer and chat template as a Hugging Face directory");
  gguf->footer("Example:\n  moegraft import gguf SmolLM2-135M-Instruct.Q4_1.gguf -o models/smollm2");
  gguf->add_option("file", o->file, "The GGUF file (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K)")
      ->required();
  gguf->add_option("-o,--out", o->out, "Folder to write; it must not exist yet")->required();
  gguf->add_option("--dtype", o->dtype, "float32 (a quantised file's values as they are), bfloat16 or float16")
      ->capture_default_str();
  gguf->add_flag("--json", o->json, "Print a JSON object");
  gguf->callback([o] { import_command(*o); });
}

}  // namespace moegraft::tools
