#include "moegraft/model/vocabulary.h"

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::model {

std::vector<int64_t> Vocabulary::id_bounds() const {
  std::vector<int64_t> bounds{0, text_size};
  for (const auto& modality : modalities) bounds.push_back(modality.first_id + modality.num_rows());
  return bounds;
}

int64_t Vocabulary::modality_of(int64_t id) const {
  MOEGRAFT_CHECK(id >= 0 && id < size(), "token id ", id, " is outside the vocabulary: ids are 0 to ", size() - 1, " (",
                 text_size, " text ids, ", size() - text_size, " new ones)");
  if (id < text_size) return 0;
  for (const auto& modality : modalities)
    if (id < modality.first_id + modality.num_rows()) return modality.modality;
  return 0;  // unreachable: size() ends with the last modality
}

const ModalityTokens& Vocabulary::by_name(const std::string& name) const {
  std::vector<std::string> known;
  for (const auto& modality : modalities) {
    if (modality.name == name) return modality;
    known.push_back(modality.name);
  }
  fail<UserError>("no modality \"", name,
                  "\": ", known.empty() ? "this model has text only" : "known ones are " + join(known, ", "));
}

}  // namespace moegraft::model
