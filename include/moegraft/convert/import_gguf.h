#pragma once
// From a GGUF file to a Hugging Face directory that transformers and moegraft read.

#include <torch/types.h>

#include <filesystem>
#include <string>

namespace moegraft::convert {

struct ImportOptions {
  at::ScalarType dtype = at::kBFloat16;  // float32 keeps a quantised file's values as they are
  int64_t max_shard_bytes = int64_t{2} << 30;
};
struct ImportReport {
  std::string architecture, model_type;
  int64_t parameters = 0, experts = 0;
  bool tied = false;
};

// Writes weights (rotary order of queries and keys undone), config.json, generation_config.json, tokenizer.json and
// tokenizer_config.json into `dir`, which appears whole or not at all. Architectures: llama (dense, and with experts:
// Mixtral), qwen3, qwen3moe, olmoe. UserError: what the file lacks, or holds that the target cannot express;
// UsageError: `dir` is not new.
ImportReport import_gguf(const std::filesystem::path& file, const std::filesystem::path& dir,
                         const ImportOptions& options = {});

}  // namespace moegraft::convert
