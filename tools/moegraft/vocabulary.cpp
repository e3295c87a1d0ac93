#include "vocabulary.h"

#include <filesystem>

#include "moegraft/base/check.h"
#include "moegraft/codec/codec.h"

namespace moegraft::tools {

model::Vocabulary vocabulary_of(model::Vocabulary v, const std::map<std::string, graft::ModalityConfig>& modalities,
                                int64_t codebook) {
  for (const auto& [name, section] : modalities) {
    int64_t codes = codebook, length = 0, codebooks = 1;
    if (codes == 0) {
      MOEGRAFT_CHECK(std::filesystem::is_directory(section.codec), "modalities.", name, ".codec: ", section.codec,
                     " does not exist: make one with `moegraft codec train`, or plan without it: --codebook N, the "
                     "number of its codes");
      const auto codec = codec::load_codec(section.codec);
      codes = codec->num_codes();
      length = codec->item_length();
      codebooks = codec->shape().codebooks;
    }
    v.modalities.push_back({name, int64_t(v.modalities.size()) + 1, v.size(), codes, length, codebooks});
  }
  return v;
}

}  // namespace moegraft::tools
