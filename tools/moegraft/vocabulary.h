#pragma once
// Token ids of a config whose run has not started.

#include <map>
#include <string>

#include "moegraft/graft/config.h"
#include "moegraft/model/vocabulary.h"

namespace moegraft::tools {

// `text` and a run's modalities, whose sizes their codecs tell. codebook: codes to assume instead (item lengths are
// then unknown, 0); 0: read the codecs.
model::Vocabulary vocabulary_of(model::Vocabulary text, const std::map<std::string, graft::ModalityConfig>& modalities,
                                int64_t codebook = 0);

}  // namespace moegraft::tools
