#include "sentencepiece.h"

#include <sentencepiece_processor.h>

#include "files.h"
#include "moegraft/base/check.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581

bool bool_field(const nlohmann::json& config, const char* key, bool otherwise) {
  const auto it = config.find(key);
  return it != config.end() && it->is_boolean() ? it->get<bool>() : otherwise;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(const std::filesystem::path& file) {
    const auto status = processor_.LoadFromSerializedProto(read_file(file));
    MOEGRAFT_CHECK(status.ok(), file.string(), ": not a sentencepiece model (", status.message(),
                   "); a Git LFS pointer or a truncated download looks like this, fetch the file again");
    const auto config = read_tokenizer_config(file.parent_path());
    add_bos_ = bos_id() >= 0 && bool_field(config, "add_bos_token", true);
    add_eos_ = eos_id() >= 0 && bool_field(config, "add_eos_token", false);
    // The only public trace of add_dummy_prefix: whether a leading space piece vanishes in decoding.
    const int space = processor_.PieceToId(std::string(kSpace));
    strips_leading_space_ = !processor_.IsUnknown(space) && processor_.DecodeIds({space}).empty();
  }

  std::vector<int64_t> encode(std::string_view text, bool add_special) const override {
    std::vector<int> ids;
    const auto status = processor_.Encode(valid_utf8(text), &ids);
    MOEGRAFT_CHECK(status.ok(), "sentencepiece cannot encode the text: ", status.message());
    std::vector<int64_t> out;
    out.reserve(ids.size() + 2);
    if (add_special && add_bos_) out.push_back(bos_id());
    out.insert(out.end(), ids.begin(), ids.end());
    if (add_special && add_eos_) out.push_back(eos_id());
    return out;
  }

  std::string decode(const std::vector<int64_t>& ids, bool skip_special) const override {
    std::string text;
    std::vector<int> run;
    bool first = true;
    auto flush = [&] {
      if (run.empty()) return;
      if (!first && strips_leading_space_ && processor_.IdToPiece(run.front()).starts_with(kSpace)) text += ' ';
      text += processor_.DecodeIds(run);
      run.clear();
      first = false;
    };
    for (const int64_t id : ids) {
      check_id(id);
      if (!processor_.IsControl(static_cast<int>(id))) {
        run.push_back(static_cast<int>(id));
      } else if (!skip_special) {
        flush();
        text += processor_.IdToPiece(static_cast<int>(id));
      }
    }
    flush();
    return text;
  }

  int64_t size() const override { return processor_.GetPieceSize(); }

  int64_t id_of(std::string_view piece) const override {
    const int id = processor_.PieceToId(absl::string_view(piece.data(), piece.size()));
    return id >= 0 && id < size() && processor_.IdToPiece(id) == piece ? id : -1;
  }

  std::string piece_of(int64_t id) const override {
    check_id(id);
    return processor_.IdToPiece(static_cast<int>(id));
  }

  int64_t bos_id() const override { return processor_.bos_id(); }
  int64_t eos_id() const override { return processor_.eos_id(); }

 private:
  void check_id(int64_t id) const {
    MOEGRAFT_CHECK(id >= 0 && id < size(), "token id must be in [0, ", size(), "), got ", id);
  }

  sentencepiece::SentencePieceProcessor processor_;
  bool add_bos_ = false, add_eos_ = false, strips_leading_space_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file) {
  return std::make_unique<SentencePieceTokenizer>(file);
}

}  // namespace moegraft::tokenizer
