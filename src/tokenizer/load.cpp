#include "files.h"
#include "moegraft/base/check.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "sentencepiece.h"

namespace moegraft::tokenizer {

namespace fs = std::filesystem;

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  MOEGRAFT_CHECK(fs::exists(path), path.string(), ": no such tokenizer file or model folder");
  const fs::path sentencepiece = fs::is_directory(path) ? path / "tokenizer.model" : path;
  MOEGRAFT_CHECK(fs::exists(sentencepiece), path.string(), ": no tokenizer: expected tokenizer.json or tokenizer.model in the folder");
  return load_sentencepiece(sentencepiece);
}

}  // namespace moegraft::tokenizer
