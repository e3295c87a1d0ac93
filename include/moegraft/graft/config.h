#pragma once
// The `modalities` and `embeddings` sections of a run.

#include <span>
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

// Where the new embedding and head rows start. The functions stand in initialise_rows.cpp, in the same order.
enum class RowInit { random, sampled_rows, moment_match, gw_barycentric, gw_procrustes, gw_cluster };
struct RowInitRow {
  RowInit value;
  const char *name, *meaning;
  bool needs_ot;  // a Gromov-Wasserstein plan T between codebook vectors and text embedding rows
};
inline constexpr RowInitRow kRowInits[] = {
    {RowInit::random, "random", "normal at the text rows' root mean square.", false},
    {RowInit::sampled_rows, "sampled_rows", "distinct text rows, the same ones for embedding and head.", false},
    {RowInit::moment_match, "moment_match",
     "drawn with mean and full covariance of the text rows, joint over embedding and head.", false},
    {RowInit::gw_barycentric, "gw_barycentric",
     "each code at the mean of the text rows that the plan couples it with; mean and scale matched to the text rows.",
     true},
    {RowInit::gw_procrustes, "gw_procrustes",
     "the codebook turned into text space by the orthonormal map nearest to the plan, which keeps its geometry (and "
     "rank); mean and scale matched.",
     true},
    {RowInit::gw_cluster, "gw_cluster",
     "k-means centres are coupled; a code becomes a row of its cluster's matched text clusters, by distance to the "
     "centre.",
     true},
};
constexpr std::span<const RowInitRow> choices_of(RowInit) { return kRowInits; }

struct EmbeddingConfig {
  RowInit init = RowInit::moment_match;
  template <class V>
  void visit_fields(V& v) {
    v("init", init, config::any(), "Where the new rows start.");
  }
};

}  // namespace moegraft::graft
