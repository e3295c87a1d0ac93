#include "moegraft/data/fingerprints.h"

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/fingerprint.h"

namespace moegraft::data {
namespace {

// Letters of several scripts, numbers, runs of spaces, line ends, contractions, marks in both normal forms, emoji,
// code.
constexpr const char* kProbe =
    "The red heart's  HTTPServer 'S 2024, 1,000.5e-3 ½ ②\n\n\tdef f(x): return x[i]+1  # ok\r\n das Mädchen Straße ẞ "
    "e\u0301té ﬁ красное 日本語 模型 नमस्ते ❤\uFE0F 👩‍👧 \u00a0x\u3000y "
    "<s></s><|im_end|> "
    " "
    " ";

std::string weights_fingerprint(const std::filesystem::path& dir) {
  const auto counts = [](const std::string& name) {
    return name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
  };
  MOEGRAFT_CHECK(std::filesystem::is_directory(dir), "the folder ", dir.string(), " does not exist");
  return io::fingerprint_folder(dir, counts);
}

}  // namespace

std::string tokenizer_fingerprint(const tokenizer::Tokenizer& tokenizer) {
  std::string text;
  for (int64_t id = 0; id < tokenizer.size(); ++id) {
    try {
      text += tokenizer.piece_of(id);
    } catch (const UserError&) {
      // an id between the vocabulary and added tokens that nothing has
    }
    text += '\n';
  }
  for (const bool special : {false, true}) {
    try {
      for (const int64_t id : tokenizer.encode(kProbe, special)) text += std::to_string(id) + ' ';
    } catch (const UserError&) {
      text += "cannot say it";  // a vocabulary without bytes or an unknown token
    }
  }
  return io::checksum_hex(text);
}

std::string codec_fingerprint(const std::filesystem::path& dir) { return weights_fingerprint(dir); }
std::string base_fingerprint(const std::filesystem::path& dir) { return weights_fingerprint(dir); }
std::string source_fingerprint(const std::filesystem::path& path) {
  MOEGRAFT_CHECK(std::filesystem::exists(path), "data source not found: ", path.string(),
                 " (make it with `moegraft data prepare shards`)");
  return io::fingerprint_folder(path, [](const std::string& name) { return name.ends_with(".safetensors"); });
}

}  // namespace moegraft::data
