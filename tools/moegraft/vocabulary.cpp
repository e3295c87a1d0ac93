#include "vocabulary.h"

#include "moegraft/codec/codec.h"

namespace moegraft::tools {

model::Vocabulary vocabulary_of(model::Vocabulary v, const std::map<std::string, graft::ModalityConfig>& modalities, int64_t codebook) {
  for (const auto& [name, section] : modalities) {
    int64_t codes = codebook, length = 0;
    if (codes == 0) {
      const auto codec = codec::load_codec(section.codec);
      codes = codec->codebook_size();
      length = codec->grid() * codec->grid();
    }
    v.modalities.push_back({name, int64_t(v.modalities.size()) + 1, v.size(), codes, length});
  }
  return v;
}

}  // namespace moegraft::tools
