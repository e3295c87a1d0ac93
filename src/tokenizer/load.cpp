#include "files.h"
#include "hf_tokenizer.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "sentencepiece.h"

namespace moegraft::tokenizer {

namespace fs = std::filesystem;

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  MOEGRAFT_CHECK(fs::exists(path), path.string(), ": no such tokenizer file or model folder");
  const bool folder = fs::is_directory(path);
  const fs::path json_file = folder ? path / "tokenizer.json" : path;
  const fs::path model_file = folder ? path / "tokenizer.model" : path;
  if (!folder && path.extension() != ".json") return load_sentencepiece(model_file);
  if (!folder || fs::exists(json_file)) {
    const auto json = read_json(json_file);
    const Field model = Field(json, json_file.string() + "").at("model");
    // Files of 2019-20 leave the type out; they have merges.
    const std::string type = model.string_or("type", model.has("merges") ? "BPE" : "");
    if (type == "BPE") return make_hf_tokenizer(json, json_file);
    if (!folder || !fs::exists(model_file)) {
      fail<UserError>(model.place(), ": model '", type,
                      "' is not supported: expected BPE, or a sentencepiece tokenizer.model beside the file");
    }
    log::debug(json_file.string(), ": model '", type, "' is read from tokenizer.model instead");
  }
  MOEGRAFT_CHECK(fs::exists(model_file), path.string(),
                 ": no tokenizer: expected tokenizer.json or tokenizer.model in the folder");
  return load_sentencepiece(model_file);
}

}  // namespace moegraft::tokenizer
