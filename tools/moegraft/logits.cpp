// moegraft logits: an exact forward pass on given ids, for parity checks.
#include "libtorch.h"

#include <charconv>
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::tools {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string model, ids, output, against, dtype = "float32", quantize, device = "cpu", gate = "modality",
                                           checkpoint = "latest";
  bool decode = false, json = false;
};

model::Gate parse_gate(const std::string& name) {
  if (name == "modality") return model::Gate::modality;
  if (name == "all") return model::Gate::all;
  if (name == "none") return model::Gate::none;
  fail<UsageError>("--gate must be modality, all or none, got '", name, "'");
}

// "1,2,3" or "1 2 3" is one sequence; anything else is a file.
at::Tensor read_ids(const std::string& given) {
  std::error_code no_name;  // a long list of ids
  if (given.find_first_not_of("0123456789-+., ") == std::string::npos && !std::filesystem::exists(given, no_name)) {
    std::vector<int64_t> ids;
    bool after_id = false;  // where a comma may stand
    for (const char *at = given.data(), *end = at + given.size(); at < end;) {
      if (*at == ' ' || (*at == ',' && after_id)) {
        after_id = after_id && *at == ' ';
        ++at;
        continue;
      }
      const auto read = std::from_chars(at, end, ids.emplace_back());
      const bool whole = read.ptr == end || *read.ptr == ',' || *read.ptr == ' ';
      MOEGRAFT_CHECK_USAGE(read.ec != std::errc::result_out_of_range, "--ids: a number is out of range in ",
                           shortened(given));
      MOEGRAFT_CHECK_USAGE(read.ec == std::errc() && whole && ids.back() >= 0,
                           "--ids must be ids such as 1,2,3, each from 0 up, got ", shortened(given));
      at = read.ptr, after_id = true;
    }
    MOEGRAFT_CHECK_USAGE(after_id, "--ids must be ids such as 1,2,3 or a safetensors file with input_ids, got '", given,
                         "'");
    return at::tensor(ids, at::kLong).unsqueeze(0);
  }
  const at::Tensor ids = io::SafetensorsFile(given).tensor("input_ids");
  MOEGRAFT_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong, given, ": input_ids must be int64 [B,S], got ",
                 c10::toString(ids.scalar_type()), " ", ids.sizes().vec());
  MOEGRAFT_CHECK(ids.numel() > 0, given, ": input_ids is empty: ", ids.sizes().vec());
  return ids;
}

at::Tensor modality_of_ids(const model::Vocabulary& vocabulary, const at::Tensor& ids_T) {
  at::Tensor out = at::zeros_like(ids_T);
  for (const auto& m : vocabulary.modalities)
    out.masked_fill_((ids_T >= m.first_id) & (ids_T < m.first_id + m.num_rows()), m.modality);
  return out;
}

// Token by token through the cache: what generation computes.
at::Tensor decode_logits(const model::Decoder& decoder, const model::PackedBatch& all, const at::Tensor& ids_BS,
                         model::ForwardOptions options) {
  const int64_t B = ids_BS.size(0), S = ids_BS.size(1);
  model::KvCache cache(decoder.spec(), B, S, decoder.dtype(), decoder.device());
  options.cache = &cache;
  std::vector<at::Tensor> steps;
  for (int64_t s = 0; s < S; ++s) {
    model::PackedBatch batch = model::pack_rows(ids_BS.narrow(1, s, 1));
    batch.positions_T.fill_(s);
    if (all.modality_T.defined()) batch.modality_T = all.modality_T.view({B, S}).select(1, s).contiguous();
    steps.push_back(decoder.all_logits(decoder.forward(batch, options).hidden_TD));
  }
  return at::stack(steps, 1);
}

// Logits [B,S,V] of a file, which must be of the ids [B,S].
at::Tensor read_other(const std::string& path, const at::Tensor& ids) {
  const io::SafetensorsFile file(path);
  const at::Tensor other = file.tensor("logits");
  MOEGRAFT_CHECK(other.dim() == 3 && other.size(0) == ids.size(0) && other.size(1) == ids.size(1), path,
                 ": logits must be of the same ids, [", ids.size(0), ",", ids.size(1), ",V], got ",
                 other.sizes().vec());
  MOEGRAFT_CHECK(!file.contains("input_ids") || file.tensor("input_ids").equal(ids), path,
                 ": its logits are of other ids than --ids names: compare on the same");
  MOEGRAFT_CHECK(at::isfinite(other).all().item<bool>(), path,
                 ": its logits are not all finite: nothing can be compared with them");
  return other;
}

// How far logits [B,S,V] are from another model's, in the columns that both have: a graft's new rows come after its
// base's.
void compare(const Options& o, const at::Tensor& logits, const at::Tensor& other) {
  const int64_t V = std::min(logits.size(2), other.size(2));
  if (logits.size(2) != other.size(2))
    log::warning("the vocabularies have ", logits.size(2), " and ", other.size(2), " ids: compared are the first ", V,
                 " of both");
  MOEGRAFT_CHECK(
      at::isfinite(logits).all().item<bool>(), "the logits of ", o.model,
      " are not all finite: nothing can be compared with them (a damaged model, or --dtype float32 is needed)");
  const at::Tensor a = logits.narrow(2, 0, V), b = other.narrow(2, 0, V).to(at::kFloat);
  const Json result{{"positions", a.size(0) * a.size(1)},
                    {"ids", V},
                    {"max_abs_difference", (a - b).abs().max().item<double>()},
                    {"max_abs", b.abs().max().item<double>()},
                    {"same_likeliest_percent", 100 * a.argmax(2).eq(b.argmax(2)).to(at::kDouble).mean().item<double>()},
                    {"equal_bits", a.equal(b)}};
  if (o.json)
    std::cout << result.dump() << '\n';
  else
    log::info("against ", o.against, ": largest difference ", result["max_abs_difference"].get<double>(),
              " of logits up to ", result["max_abs"].get<double>(), ", the same likeliest token at ",
              result["same_likeliest_percent"].get<double>(), " % of ", result["positions"].get<int64_t>(),
              " positions", a.equal(b) ? ", equal bits" : "");
}

// Weights, or what another is compared with, are not replaced.
void check_output(const Options& o) {
  namespace fs = std::filesystem;
  if (o.output.empty() || !fs::exists(o.output)) return;
  MOEGRAFT_CHECK_USAGE(o.against.empty() || !fs::equivalent(o.output, o.against),
                       "-o and --against are the same file, ", o.output, ": give another for -o");
  check_tensor_output(o.output, {"logits", "input_ids"});
}

void run(const Options& o) {
  MOEGRAFT_CHECK_USAGE(!o.output.empty() || !o.against.empty(),
                       "logits: give -o FILE to write them, or --against FILE to compare them");
  const model::Gate gate = parse_gate(o.gate);
  graft::OpenOptions open;
  open.dtype = graft::parse_dtype(o.dtype);
  if (!o.quantize.empty()) open.quantize = config::parse_choice<model::Quantize>("--quantize", o.quantize);
  open.device = config::parse_choice<config::Device>("--device", o.device);
  open.checkpoint = o.checkpoint;
  open.with_codecs = false;
  const at::Tensor ids = read_ids(o.ids);
  check_output(o);
  const at::Tensor other = o.against.empty() ? at::Tensor() : read_other(o.against, ids);
  graft::GraftedModel m = graft::open_model(o.model, open);
  at::NoGradGuard no_grad;
  model::PackedBatch batch = model::pack_rows(ids.to(m.device()));
  if (m.is_graft()) batch.modality_T = modality_of_ids(m.vocabulary, batch.ids_T);
  model::ForwardOptions options;
  options.gate = gate;
  const at::Tensor logits =
      o.decode
          ? decode_logits(*m.decoder, batch, ids.to(m.device()), options)
          : m.decoder->all_logits(m.decoder->forward(batch, options).hidden_TD).view({ids.size(0), ids.size(1), -1});
  if (!o.output.empty()) {
    io::save_safetensors(o.output, {{"input_ids", ids}, {"logits", logits}}, {{"gate", o.gate}, {"dtype", o.dtype}});
    log::info("wrote ", o.output, ": logits ", logits.sizes().vec());
  }
  if (!o.against.empty()) compare(o, logits.cpu(), other);
}

}  // namespace

void add_logits_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* cmd = app.add_subcommand("logits", "Exact logits of a model or run on given ids");
  cmd->add_option("model", o->model, "Hugging Face directory or run")->required();
  cmd->add_option("--ids", o->ids, "One sequence of ids (1,2,3), or a safetensors file with input_ids int64 [B,S]")
      ->required();
  cmd->add_option("-o,--output", o->output,
                  "safetensors to write: logits float32 [B,S,V], V with a run's new rows, and their input_ids");
  cmd->add_option("--against", o->against, "Such a file of another model, on the same ids: say how far they are apart");
  cmd->add_option("--dtype", o->dtype, "float32 or bfloat16")->capture_default_str();
  cmd->add_option("--quantize", o->quantize, "How the base's matrices are stored: none or q8_0 (default: the run's)");
  cmd->add_option("--device", o->device, "cpu or cuda")->capture_default_str();
  cmd->add_option("--gate", o->gate,
                  "modality: adapters act on their modality's tokens; all: on every token; none: on no token")
      ->capture_default_str();
  cmd->add_option("--checkpoint", o->checkpoint, "latest, best, a step or a directory (runs)")->capture_default_str();
  cmd->add_flag("--json", o->json, "--against as a JSON object on stdout");
  cmd->add_flag("--decode", o->decode, "Token by token through the key/value cache");
  cmd->footer(
      "Examples:\n  moegraft logits models/base --ids 1,2,3 -o logits.safetensors\n  moegraft logits models/base --ids "
      "ids.safetensors -o logits.safetensors --dtype bfloat16");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools
