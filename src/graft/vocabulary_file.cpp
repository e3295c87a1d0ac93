#include "moegraft/graft/vocabulary_file.h"

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"

namespace moegraft::graft {

void write_vocabulary(const std::filesystem::path& run_dir, const model::Vocabulary& v) {
  io::Json list = io::Json::array();
  for (const auto& m : v.modalities)
    list.push_back({{"name", m.name}, {"modality", m.modality}, {"first_id", m.first_id}, {"begin_id", m.begin_id()}, {"end_id", m.end_id()}, {"num_codes", m.num_codes}, {"item_length", m.item_length}});
  io::write_json(run_dir / "vocabulary.json", {{"text_size", v.text_size}, {"bos_id", v.bos_id}, {"eos_id", v.eos_id}, {"size", v.size()}, {"modalities", list}});
}

std::optional<model::Vocabulary> read_vocabulary(const std::filesystem::path& run_dir) {
  const auto file = run_dir / "vocabulary.json";
  if (!std::filesystem::exists(file)) return std::nullopt;
  const io::Json j = io::read_json(file);
  try {
    model::Vocabulary v{j.at("text_size"), j.at("bos_id"), j.at("eos_id"), {}};
    for (const auto& m : j.at("modalities")) v.modalities.push_back({m.at("name"), m.at("modality"), m.at("first_id"), m.at("num_codes"), m.at("item_length")});
    return v;
  } catch (const io::Json::exception& e) {
    fail<UserError>(file.string(), ": ", e.what());
  }
}

}  // namespace moegraft::graft
