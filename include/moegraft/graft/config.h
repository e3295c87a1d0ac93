#pragma once
// The `modalities` and `embeddings` sections of a run.

#include <string>

#include "moegraft/config/config.h"

namespace moegraft::graft {

struct ModalityConfig {
  std::string codec;  // folder of the codec
  std::string begin = "<image>", end = "</image>";
  template <class V>
  void visit_fields(V& v) {
    v("codec", codec, config::required(config::path()), "Folder of the image codec.");
    v("begin", begin, config::any(), "Name of the token that opens a span.");
    v("end", end, config::any(), "Name of the token that closes a span.");
  }
};

struct EmbeddingConfig {
  std::string init = "moment_match";
  template <class V>
  void visit_fields(V& v) {
    v("init", init, config::one_of({"random", "sampled_rows", "moment_match", "gw_barycentric", "gw_procrustes", "gw_cluster"}), "Initialisation of the new rows.");
  }
};

}  // namespace moegraft::graft
