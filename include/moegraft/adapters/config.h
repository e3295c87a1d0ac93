#pragma once
// The `adapters` list of a run.

#include <span>
#include <string>
#include <vector>

#include "moegraft/config/config.h"

namespace moegraft::adapters {

// Where LoRA's A starts; B starts at zero. The functions stand in graft/initialise_lora.cpp, in the same order.
enum class FactorInit { kaiming_zero, gw_subspace, activation_svd };
struct FactorInitRow {
  FactorInit value;
  const char *name, *meaning;
  bool needs_calibration;  // inputs of the expert sites, which documents of data.train are run through the base for
  bool needs_ot;           // a Gromov-Wasserstein solve for each expert and site, and so text's inputs too
};
inline constexpr FactorInitRow kFactorInits[] = {
    {FactorInit::kaiming_zero, "kaiming_zero", "uniform in ±1/√in, as PEFT does.", false, false},
    {FactorInit::gw_subspace, "gw_subspace",
     "on experts, the directions in which the new modality's inputs vary most once Gromov-Wasserstein has mapped them "
     "to where they would lie among text's; Kaiming's on attention.",
     true, true},
    {FactorInit::activation_svd, "activation_svd",
     "the control without Gromov-Wasserstein: on experts, the directions in which the new modality's inputs vary most; "
     "Kaiming's on attention.",
     true, false},
};
constexpr std::span<const FactorInitRow> choices_of(FactorInit) { return kFactorInits; }

enum class AdapterKind { modality_lora, vera };
inline constexpr config::Named<AdapterKind> kAdapterKinds[] = {
    {AdapterKind::modality_lora, "modality_lora", "LoRA: two trained factors at every site and for every expert."},
    {AdapterKind::vera, "vera",
     "frozen random factors that all sites share, and two trained vectors at every site and for every expert "
     "(arXiv:2310.11454): a small part of LoRA's parameters, at larger ranks."},
};
constexpr std::span<const config::Named<AdapterKind>> choices_of(AdapterKind) { return kAdapterKinds; }

// Keys of single kinds.
struct ModalityLoraConfig {
  double alpha = 32;
  bool use_rslora = false;
  FactorInit init = FactorInit::kaiming_zero;
  template <class V>
  void visit_fields(V& v) {
    v("alpha", alpha, config::range(0.0, 1e6),
      "LoRA alpha: the scale is alpha/rank, or alpha/sqrt(rank) with use_rslora.");
    v("use_rslora", use_rslora, config::any(), "Rank-stabilised scale.");
    v("init", init, config::any(), "Where A starts (B starts at zero).");
  }
};
struct VeraConfig {
  double d_initial = 0.1;
  int64_t projection_seed = 0;
  template <class V>
  void visit_fields(V& v) {
    v("d_initial", d_initial, config::range(1e-9, 10.0),
      "Where the vector between the two frozen factors starts; the other starts at zero.");
    v("projection_seed", projection_seed, config::range(0, 9e15), "What the frozen factors are drawn from.");
  }
};

struct AdapterConfig : ModalityLoraConfig, VeraConfig {
  AdapterKind kind = AdapterKind::modality_lora;
  std::vector<std::string> modality = {"image"};
  int64_t rank = 16;
  std::vector<std::string> sites = {"gate", "up", "down", "q", "k", "v", "o"};
  std::vector<int64_t> layers;  // empty: all
  std::string init_from;        // a run or a checkpoint whose adapter of the same shape to start from

  AdapterKind& tag() { return kind; }  // which keys follow (config.h)
  template <class V>
  void visit_fields(V& v) {
    v("kind", kind, config::any(), "Kind of adapter.");
    v("modality", modality, config::any(), "Names of the modalities whose tokens it acts on.");
    v("rank", rank, config::range(1, 1024), "Rank P of its low-rank terms.");
    v("sites", sites, config::any(),
      "Where it acts: gate, up, down (every expert's; a dense model's FFN), q, k, v, o (attention), router (the choice "
      "of experts).");
    v("layers", layers, config::any(), "Layer indices; empty: all.");
    v("init_from", init_from, config::path(), "Start from the adapter of an earlier run.");
    switch (kind) {
      case AdapterKind::modality_lora: ModalityLoraConfig::visit_fields(v); break;
      case AdapterKind::vera: VeraConfig::visit_fields(v); break;
    }
  }
};

}  // namespace moegraft::adapters
