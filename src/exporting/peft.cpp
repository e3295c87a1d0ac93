#include "moegraft/exporting/peft.h"

#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/io/staged_folder.h"
#include "peft_config.h"
#include "peft_layout.h"
#include "peft_rows.h"

namespace moegraft::exporting {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kFiles{"adapter_model.safetensors", "adapter_config.json", "moegraft.json",
                                      "vocabulary.json", "README.md"};

fs::path check_output(const PeftOptions& options) {
  MOEGRAFT_CHECK_USAGE(!options.output.empty(), "the export needs a folder to write: -o DIR");
  fs::path output = fs::absolute(options.output).lexically_normal();
  if (!output.has_filename()) output = output.parent_path();  // "dir/"
  MOEGRAFT_CHECK_USAGE(fs::is_directory(output.parent_path()), "the folder ", output.parent_path().string(),
                       " does not exist; make it first");
  if (!fs::exists(output)) return output;
  MOEGRAFT_CHECK_USAGE(options.overwrite, output.string(), " exists; choose another folder or pass --overwrite");
  MOEGRAFT_CHECK_USAGE(fs::exists(output / "moegraft.json") && fs::exists(output / "adapter_config.json"),
                       output.string(), " exists and is no earlier export; --overwrite replaces only those");
  const std::string foreign = io::find_foreign(output, kFiles);
  MOEGRAFT_CHECK_USAGE(foreign.empty(), output.string(), " holds ", foreign,
                       ", which no export wrote and --overwrite would remove: move it away or choose another folder");
  return output;
}

void check_model(const graft::GraftedModel& m) {
  MOEGRAFT_CHECK_USAGE(m.adapters && !m.adapters->adapters().empty(), m.path.string(), " has no adapter to export",
                       m.is_graft() ? ": PEFT's LoRA format needs at least one beside the new rows"
                                    : "; a plain model is already a Hugging Face directory");
  MOEGRAFT_CHECK_USAGE(!m.config || m.config->train.base_weights != train::BaseWeights::full, m.path.string(),
                       " trained the base itself (train.base_weights: full), which a PEFT adapter cannot carry");
}

}  // namespace

std::string Rows::key() const {
  return std::string("base_model.model.") + (std::string_view(module) == "lm_head" ? "" : "model.") + module +
         ".token_adapter.trainable_tokens_delta";
}

std::vector<Rows> new_rows(const graft::GraftedModel& m) {
  if (!m.is_graft()) return {};
  std::vector<at::Tensor> embedding, head;
  int64_t next = m.vocabulary.text_size;
  for (const auto& rows : m.decoder->rows()) {
    MOEGRAFT_INVARIANT(rows.first_id == next, "rows must continue the vocabulary");
    next += rows.embedding_ND.size(0);
    embedding.push_back(rows.embedding_ND.detach().to(at::kCPU, at::kFloat));
    head.push_back(rows.head_ND.detach().to(at::kCPU, at::kFloat));
  }
  std::vector<Rows> out{{"embed_tokens", at::cat(embedding)}};
  if (!m.decoder->spec().tie_word_embeddings) out.push_back({"lm_head", at::cat(head)});
  return out;
}

PeftReport export_peft(const graft::GraftedModel& m, const PeftOptions& options) {
  const at::NoGradGuard no_grad;
  const fs::path output = check_output(options);
  check_model(m);
  const std::string base_name =
      !options.base_name.empty() ? options.base_name : fs::absolute(m.base_path).lexically_normal().string();
  MOEGRAFT_CHECK_USAGE(!options.base_name.empty() || !m.base_path.empty(), m.path.string(),
                       " does not say where its base lies; name it with --base-name");
  const std::vector<Target> targets = collect_targets(m.decoder->spec(), m.adapters->adapters());
  const double scale = common_scale(targets);

  io::StagedFolder folder(output);
  {
    io::TensorMap tensors;
    for (const Target& t : targets) {
      const Factors packed = pack(t, scale);
      tensors[tensor_key(t, targets, "lora_A")] = packed.A;
      tensors[tensor_key(t, targets, "lora_B")] = packed.B;
    }
    for (const Rows& rows : new_rows(m)) tensors[rows.key()] = rows.tensor_ND;
    io::save_safetensors(folder.path() / "adapter_model.safetensors", tensors,
                         {{"format", "pt"}, {"moegraft_gate", "modality"}});
  }
  io::write_json(folder.path() / "adapter_config.json", adapter_config(m, targets, base_name));
  io::write_json(folder.path() / "moegraft.json", gating_marker(m, targets, base_name));
  graft::write_vocabulary(folder.path(), m.vocabulary);
  io::write_file_atomic(folder.path() / "README.md", readme(m, base_name));

  PeftReport report = verify_peft(m, folder.path());
  folder.publish([&] { check_output(options); });
  report.output = output;
  if (report.silent_experts > 0)
    log::warning(report.silent_experts, " of ", report.experts,
                 " expert deltas are zero: those experts' adapters were never trained");
  return report;
}

}  // namespace moegraft::exporting
