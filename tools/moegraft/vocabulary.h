#pragma once
// Token ids of a config whose run has not started.

#include "moegraft/model/vocabulary.h"
#include "moegraft/run/run_config.h"

namespace moegraft::tools {

// `text` and the config's modalities, whose sizes their codecs tell. codebook: codes to assume instead (item lengths are then unknown, 0); 0: read the codecs.
model::Vocabulary vocabulary_of(model::Vocabulary text, const run::RunConfig& config, int64_t codebook = 0);

}  // namespace moegraft::tools
