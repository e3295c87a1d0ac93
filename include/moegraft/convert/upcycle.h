#pragma once
// A dense Hugging Face model as a mixture of experts: attention, norms and embeddings stay, each FFN becomes experts
// and a router.
//
//   virtual_groups  the FFN's neurons are dealt into `shards` parts, and the whole set is cloned `clones` times; a
//   clone's shards share a router row, so that the top
//                   `shards` experts are one clone whole. The function is kept (Upcycling LLMs into MoE,
//                   arXiv:2410.07524).
//   clone           `experts` copies, `top_k` active: kept for any router, since weights sum to one (Sparse Upcycling,
//   arXiv:2212.05055). `noise` adds normal noise of that
//                   share of a matrix's standard deviation; `redraw` draws that share of each expert's neurons anew
//                   (Drop-Upcycling, arXiv:2502.19261): not kept then.
//   split           the neurons in `experts` parts, `top_k` active, outputs times experts / top_k (LLaMA-MoE,
//   arXiv:2406.16554): not kept. cluster         the neurons that are most active on calibration text in every expert,
//   the others in `experts` parts by which of them fire together, `top_k` active
//                   (CMoE, arXiv:2502.04416): not kept, but closer. The layouts have no shared expert; since weights
//                   sum to one, a neuron that every expert holds counts once, whoever is chosen. An expert's own
//                   neurons have the factor top_k.

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace moegraft::convert {

enum class UpcycleMethod { virtual_groups, clone, split, cluster };
UpcycleMethod parse_upcycle_method(const std::string& name);  // UsageError names those that exist
//   random    normal entries of standard deviation `router_std`
//   kmeans    centres of the layer's inputs in balanced clusters; logits vary as much as a random router's
//   analytic  cluster alone: which experts' neurons add most, by linear regression from the layer's inputs
enum class UpcycleRouter { random, kmeans, analytic };
UpcycleRouter parse_upcycle_router(const std::string& name);

struct UpcycleOptions {
  UpcycleMethod method = UpcycleMethod::virtual_groups;
  int64_t shards = 4, clones = 4;         // virtual_groups
  int64_t experts = 8, top_k = 2;         // clone, split, cluster
  double shared = 0.25;                   // cluster: share of the neurons that every expert holds, or a little more
  double noise = 0, redraw = 0;           // clone
  bool contiguous = false;                // shards are runs of neurons instead of a random deal
  std::optional<UpcycleRouter> router{};  // default: random; cluster: analytic
  double router_std = 0.02;
  // Inputs of each layer's FFN on calibration text, float32 [T, D]: for cluster, and kmeans. Asked for when everything
  // else is known to be possible.
  std::function<std::vector<at::Tensor>()> inputs{};
  uint64_t seed = 0;
  int64_t max_shard_bytes = int64_t{2} << 30;
};
bool needs_inputs(const UpcycleOptions& options);

struct UpcycleReport {
  std::string from, to;  // model types
  int64_t experts = 0, top_k = 0, expert_width = 0, parameters = 0, dense_parameters = 0;
  bool keeps_function = false;
};

// Reads `dense` layer by layer and writes `dir` in Mixtral's layout (llama, mistral) or Qwen3-MoE's (qwen3), dtype,
// tokenizer and chat template as they were; `dir` appears whole or not at all. UserError: a model that is a mixture
// already or has no such layout; a width that shards do not divide. UsageError: impossible options.
UpcycleReport upcycle(const std::filesystem::path& dense, const std::filesystem::path& dir,
                      const UpcycleOptions& options);

}  // namespace moegraft::convert
