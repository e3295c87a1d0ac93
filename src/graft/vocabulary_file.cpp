#include "moegraft/graft/vocabulary_file.h"

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"

namespace moegraft::graft {

void write_vocabulary(const std::filesystem::path& run_dir, const model::Vocabulary& v) {
  io::Json list = io::Json::array();
  for (const auto& m : v.modalities)
    list.push_back({{"name", m.name},
                    {"modality", m.modality},
                    {"first_id", m.first_id},
                    {"begin_id", m.begin_id()},
                    {"end_id", m.end_id()},
                    {"num_codes", m.num_codes},
                    {"item_length", m.item_length},
                    {"codebooks", m.codebooks}});
  io::write_json(run_dir / "vocabulary.json", {{"text_size", v.text_size},
                                               {"bos_id", v.bos_id},
                                               {"eos_id", v.eos_id},
                                               {"size", v.size()},
                                               {"modalities", list}});
}

std::optional<model::Vocabulary> read_vocabulary(const std::filesystem::path& run_dir) {
  const auto file = run_dir / "vocabulary.json";
  if (!std::filesystem::exists(file)) return std::nullopt;
  const io::Json j = io::read_json(file);
  try {
    model::Vocabulary v{j.at("text_size"), j.at("bos_id"), j.at("eos_id"), {}};
    // Sizes of tensors come from here: in range, and each modality's ids behind those before it.
    constexpr int64_t kMost = int64_t{1} << 30;
    const auto check = [&](bool holds, const std::string& what) {
      MOEGRAFT_CHECK(holds, file.string(), ": ", what, ": damaged");
    };
    check(v.text_size > 0 && v.text_size < kMost, detail::concat("text_size ", v.text_size, " is out of range"));
    int64_t next = v.text_size;
    for (const auto& m : j.at("modalities")) {
      model::ModalityTokens tokens{
          m.at("name"),        m.at("modality"),
          m.at("first_id"),    m.at("num_codes"),
          m.at("item_length"), m.value("codebooks", int64_t{1})};  // runs were written without codebooks once
      check(tokens.num_codes > 0 && tokens.num_codes < kMost && tokens.item_length > 0 && tokens.item_length < kMost,
            tokens.name + ": num_codes or item_length is out of range");
      check(tokens.codebooks > 0 && tokens.num_codes % tokens.codebooks == 0 &&
                tokens.item_length % tokens.codebooks == 0,
            detail::concat(tokens.name, ": ", tokens.codebooks,
                           " codebooks do not divide its num_codes and item_length"));
      check(tokens.first_id == next && tokens.modality == int64_t(v.modalities.size()) + 1,
            tokens.name + ": its ids do not follow those before it");
      next += tokens.num_rows();
      v.modalities.push_back(std::move(tokens));
    }
    return v;
  } catch (const io::Json::exception& e) { fail<UserError>(file.string(), ": ", e.what()); }
}

}  // namespace moegraft::graft
