#pragma once
// The `model` section of a run.

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moegraft/config/config.h"
#include "moegraft/config/shared_choices.h"

namespace moegraft::model {

// transformers' model_type of each family, in alphabetical order (model/families.h).
std::vector<std::string> known_families();

// What the two keys below may be: auto, and the names that kernels/ has for them.
std::vector<std::string> known_cpu_paths();
std::vector<std::string> known_attention_kernels();

// A base to train from scratch. Fields left at 0 take the family's usual ratio.
struct InitConfig {
  std::string family = "olmoe";
  std::string tokenizer;   // a directory with tokenizer.json or tokenizer.model, copied into the model
  int64_t vocab_size = 0;  // 0: the tokenizer's size
  int64_t hidden_size = 192, num_layers = 4, num_heads = 6, num_kv_heads = 2, head_dim = 32;
  int64_t num_experts = 8, num_experts_per_tok = 2, moe_intermediate_size = 192, intermediate_size = 0,
          max_positions = 1024;
  bool tie_word_embeddings = false;
  double rope_theta = 10000.0;
  double embedding_std = 1.0;
  double router_aux_loss_coef = 0.01;
  template <class V>
  void visit_fields(V& v) {
    v("family", family, config::one_of(known_families()), "Layout of the model to train.");
    v("tokenizer", tokenizer, config::required(config::path()), "Folder of the text tokenizer.");
    v("vocab_size", vocab_size, config::range(0, 1 << 28), "0: the tokenizer's size.");
    v("hidden_size", hidden_size, config::range(1, 1 << 20), "Model width D.");
    v("num_layers", num_layers, config::range(1, 4096), "Layers.");
    v("num_heads", num_heads, config::range(1, 4096), "Query heads H.");
    v("num_kv_heads", num_kv_heads, config::range(1, 4096), "Key/value heads G.");
    v("head_dim", head_dim, config::range(2, 4096), "Head width C.");
    v("num_experts", num_experts, config::range(1, 4096), "Experts E.");
    v("num_experts_per_tok", num_experts_per_tok, config::range(1, 512), "Experts per token K.");
    v("moe_intermediate_size", moe_intermediate_size, config::range(1, 1 << 20), "Expert width F.");
    v("intermediate_size", intermediate_size, config::range(0, 1 << 20),
      "Width I of a dense model's FFNs; 0: moe_intermediate_size.");
    v("max_positions", max_positions, config::range(1, 1 << 26), "Longest context.");
    v("tie_word_embeddings", tie_word_embeddings, config::any(), "One matrix for embedding and head.");
    v("rope_theta", rope_theta, config::range(1.0, 1e12), "Rotary base.");
    v("embedding_std", embedding_std, config::range(0.0, 100.0),
      "Standard deviation of the embedding rows at the start.");
    v("router_aux_loss_coef", router_aux_loss_coef, config::range(0.0, 10.0), "Weight of the load-balancing loss.");
  }
  void validate(const std::string& path) const {
    MOEGRAFT_CHECK_USAGE(num_heads % num_kv_heads == 0, path, ".num_heads must be a multiple of num_kv_heads (",
                         num_kv_heads, "), got ", num_heads);
    MOEGRAFT_CHECK_USAGE(head_dim % 2 == 0, path, ".head_dim must be even (rotary positions turn pairs), got ",
                         head_dim);
    MOEGRAFT_CHECK_USAGE(num_experts_per_tok <= num_experts, path, ".num_experts_per_tok must not exceed num_experts (",
                         num_experts, "), got ", num_experts_per_tok);
  }
};

enum class Offload { none, experts };
inline constexpr config::Named<Offload> kOffloads[] = {
    {Offload::none, "none"},
    {Offload::experts, "experts",
     "the frozen experts stay in host memory and visit the device a layer at a time; every layer is then computed "
     "again in the backward pass."},
};
constexpr std::span<const config::Named<Offload>> choices_of(Offload) { return kOffloads; }

// How a frozen base is stored: as model.dtype says, or in a quantised format of kernels/weight_format.h, by the same
// name (weights.cpp checks it).
enum class Quantize { none, q8_0 };
inline constexpr config::Named<Quantize> kQuantizations[] = {
    {Quantize::none, "none", "in model.dtype."},
    {Quantize::q8_0, "q8_0",
     "8-bit integers in blocks of 32 with a float16 scale, GGUF's Q8_0: 1.06 bytes a weight. On a CPU."},
};
constexpr std::span<const config::Named<Quantize>> choices_of(Quantize) { return kQuantizations; }

struct ModelConfig {
  std::string path;                // a Hugging Face directory; or
  std::optional<InitConfig> init;  // train a base from scratch
  std::string dtype = "float32";
  config::Device device = config::Device::automatic;
  Quantize quantize = Quantize::none;
  Offload offload = Offload::none;
  std::string cpu_path = "auto",
              attention =
                  "auto";  // of the process: `moegraft train` hands them to kernels/ before anything is computed
  template <class V>
  void visit_fields(V& v) {
    v("path", path, config::path(), "Hugging Face directory of the base.");
    v("init", init, config::any(), "Train a base from scratch instead.");
    v("dtype", dtype, config::one_of({"float32", "bfloat16"}),
      "What the model computes in, and a frozen base is kept in; what trains has float32 masters.");
    v("quantize", quantize, config::any(),
      "How the frozen base's matrices are stored (embedding, head, attention, FFNs; routers and norms stay floats). "
      "Quantised once, when the model is loaded; sums are model.dtype's.");
    v("device", device, config::any(), "Where to run; auto: CUDA when there is one.");
    v("offload", offload, config::any(), "What stays off the device.");
    v("cpu_path", cpu_path, config::one_of(known_cpu_paths()),
      "The widest instructions of the CPU that may be used; auto: all that it has. Another path rounds otherwise.");
    v("attention", attention, config::one_of(known_attention_kernels()),
      "The kernel of attention over packed sequences on a GPU; auto: flash. cudnn: where it serves; it has not run on "
      "a card.");
  }
  void validate(const std::string& at) const {
    MOEGRAFT_CHECK_USAGE(!path.empty() || init, at, ": give ", at, ".path (a Hugging Face directory) or ", at,
                         ".init (train a base from scratch), got neither");
    MOEGRAFT_CHECK_USAGE(path.empty() || !init, at, ": give ", at, ".path or ", at, ".init, got both (", at,
                         ".path is ", path, ")");
    MOEGRAFT_CHECK_USAGE(quantize == Quantize::none || !init, at, ".quantize: ", config::name_of(quantize),
                         " is for a frozen base; ", at, ".init makes one that trains");
    MOEGRAFT_CHECK_USAGE(quantize == Quantize::none || offload == Offload::none, at,
                         ".quantize: ", config::name_of(quantize), " and ", at, ".offload: ", config::name_of(offload),
                         " do not go together: quantised experts stay where they compute");
  }
};

}  // namespace moegraft::model
