#pragma once
// The `adapters` list of a run.

#include <string>
#include <vector>

#include "moegraft/config/config.h"

namespace moegraft::adapters {

struct AdapterConfig {
  std::string kind = "modality_lora";
  std::vector<std::string> modality = {"image"};
  int64_t rank = 16;
  double alpha = 32;
  bool use_rslora = false;
  std::vector<std::string> sites = {"gate", "up", "down", "q", "k", "v", "o"};
  std::vector<int64_t> layers;  // empty: all
  std::string init = "kaiming_zero";
  std::string init_from;        // a run or a checkpoint whose adapter of the same shape to start from
  template <class V>
  void visit_fields(V& v) {
    v("kind", kind, config::one_of({"modality_lora"}), "Kind of adapter.");
    v("modality", modality, config::any(), "Names of the modalities whose tokens it acts on.");
    v("rank", rank, config::range(1, 1024), "LoRA rank P.");
    v("alpha", alpha, config::range(0.0, 1e6), "LoRA alpha: the scale is alpha/rank, or alpha/sqrt(rank) with use_rslora.");
    v("use_rslora", use_rslora, config::any(), "Rank-stabilised scale.");
    v("sites", sites, config::any(), "Where it acts: gate, up, down (experts), q, k, v, o (attention).");
    v("layers", layers, config::any(), "Layer indices; empty: all.");
    v("init", init, config::one_of({"kaiming_zero", "gw_subspace"}), "Initialisation of A (B starts at zero).");
    v("init_from", init_from, config::path(), "Start from the adapter of an earlier run.");
  }
};

}  // namespace moegraft::adapters
