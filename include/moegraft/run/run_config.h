#pragma once
// The whole YAML of a run. Sections live beside their owners; this file only puts them together.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/adapters/config.h"
#include "moegraft/checkpoint/config.h"
#include "moegraft/config/config.h"
#include "moegraft/data/config.h"
#include "moegraft/parallel/config.h"
#include "moegraft/routing/config.h"

namespace moegraft::run {

struct RunSection {
  std::string dir;
  int64_t seed = 17;
  template <class V>
  void visit_fields(V& v) {
    v("dir", dir, config::required(config::path()), "The run directory.");
    v("seed", seed, config::range(0, 9e15), "Seed of everything random.");
  }
};

// A base to train from scratch. Fields left at 0 take the family's usual ratio.
struct InitSection {
  std::string family = "olmoe";
  std::string tokenizer;  // a directory with tokenizer.json or tokenizer.model, copied into the model
  int64_t vocab_size = 0; // 0: the tokenizer's size
  int64_t hidden_size = 192, num_layers = 4, num_heads = 6, num_kv_heads = 2, head_dim = 32;
  int64_t num_experts = 8, num_experts_per_tok = 2, moe_intermediate_size = 192, max_positions = 1024;
  bool tie_word_embeddings = false;
  double rope_theta = 10000.0;
  double embedding_std = 1.0;
  double router_aux_loss_coef = 0.01;
  template <class V>
  void visit_fields(V& v) {
    v("family", family, config::one_of({"olmoe", "qwen3_moe", "mixtral"}), "Layout of the model to train.");
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
    v("max_positions", max_positions, config::range(1, 1 << 26), "Longest context.");
    v("tie_word_embeddings", tie_word_embeddings, config::any(), "One matrix for embedding and head.");
    v("rope_theta", rope_theta, config::range(1.0, 1e12), "Rotary base.");
    v("embedding_std", embedding_std, config::range(0.0, 100.0), "Standard deviation of the embedding rows at the start.");
    v("router_aux_loss_coef", router_aux_loss_coef, config::range(0.0, 10.0), "Weight of the load-balancing loss.");
  }
};

struct ModelSection {
  std::string path;                  // a Hugging Face directory; or
  std::optional<InitSection> init;   // train a base from scratch
  std::string dtype = "float32";
  std::string device = "auto";
  std::string offload = "none";
  template <class V>
  void visit_fields(V& v) {
    v("path", path, config::path(), "Hugging Face directory of the base.");
    v("init", init, config::any(), "Train a base from scratch instead.");
    v("dtype", dtype, config::one_of({"float32", "bfloat16"}), "Compute dtype of the base.");
    v("device", device, config::one_of({"auto", "cpu", "cuda"}), "Where to run; auto: CUDA when there is one.");
    v("offload", offload, config::one_of({"none", "experts"}), "experts: the frozen experts stay in host memory and visit the device a layer at a time; every layer is then computed again in the backward pass.");
  }
};

struct ModalitySection {
  std::string codec;  // folder of the codec
  std::string begin = "<image>", end = "</image>";
  template <class V>
  void visit_fields(V& v) {
    v("codec", codec, config::required(config::path()), "Folder of the image codec.");
    v("begin", begin, config::any(), "Name of the token that opens a span.");
    v("end", end, config::any(), "Name of the token that closes a span.");
  }
};

struct EmbeddingSection {
  std::string init = "moment_match";
  template <class V>
  void visit_fields(V& v) {
    v("init", init, config::one_of({"random", "sampled_rows", "moment_match", "gw_barycentric", "gw_procrustes", "gw_cluster"}), "Initialisation of the new rows.");
  }
};

struct OtSection {
  std::string solver = "entropic";
  std::vector<double> epsilon = {0.1, 0.03, 0.01, 0.003};
  int64_t clusters = 128;
  int64_t max_iterations = 200;
  int64_t max_points = 2048;
  int64_t calibration_tokens = 8192;
  double calibration_gib = 4;
  template <class V>
  void visit_fields(V& v) {
    v("solver", solver, config::one_of({"entropic", "proximal"}), "Gromov-Wasserstein solver.");
    v("epsilon", epsilon, config::any(), "Regularisation, annealed from first to last (relative to the largest cost).");
    v("clusters", clusters, config::range(2, 65536), "k-means centres for the clustered methods.");
    v("max_iterations", max_iterations, config::range(1, 1e6), "Outer iterations per epsilon.");
    v("max_points", max_points, config::range(2, 1 << 20), "Larger clouds are clustered to this size first.");
    v("calibration_tokens", calibration_tokens, config::range(1, 1e9), "Tokens run through the base to collect expert inputs.");
    v("calibration_gib", calibration_gib, config::range(0.0, 1e6), "Host memory for those inputs: 256 rows of each expert, site and modality, or as many fewer as fit.");
  }
};

struct OptimizerGroup {
  double lr = 1e-4, weight_decay = 0.0;
  template <class V>
  void visit_fields(V& v) {
    v("lr", lr, config::range(0.0, 10.0), "Peak learning rate.");
    v("weight_decay", weight_decay, config::range(0.0, 10.0), "Decoupled weight decay (matrices only).");
  }
};

struct TrainSection {
  int64_t steps = 1000;
  double max_minutes = 0;  // 0: no limit
  std::string optimizer = "adamw";
  std::string gradients = "float32";
  std::vector<double> betas = {0.9, 0.95};
  double adam_epsilon = 1e-8;
  OptimizerGroup lora{1e-4, 0.0}, embeddings{1e-3, 0.0}, base{3e-3, 0.1};
  std::string schedule = "cosine";
  int64_t warmup = 50;
  double min_lr_ratio = 0.05;
  double clip = 1.0;
  int64_t accumulation = 1;
  double memory_budget_gib = 0;  // 0: a GPU's free memory; on the CPU no limit
  int64_t prefix_cache_mib = 0;  // 0: none
  std::string precision = "float32";
  std::string base_weights = "frozen";
  int64_t log_every = 10;
  int64_t eval_every = 0;
  int64_t eval_tokens = 16384;
  int64_t early_stopping_patience = 0;  // 0: off
  int64_t sample_every = 0;
  std::vector<std::string> sample_prompts;
  bool allow_text_drift = false;
  bool strict = false;
  template <class V>
  void visit_fields(V& v) {
    v("steps", steps, config::range(1, 1e12), "Optimizer steps.");
    v("max_minutes", max_minutes, config::range(0.0, 1e9), "Stop cleanly after this time; 0: no limit. The schedule still spans `steps`.");
    v("optimizer", optimizer, config::one_of({"adamw", "adamw_8bit"}), "adamw_8bit: both moments in 8 bits, two bytes per parameter instead of eight (tensors below 4096 values stay float32).");
    v("gradients", gradients, config::one_of({"float32", "bf16"}),
      "What gradients are kept in from micro-batch to micro-batch. bf16: half the memory, each micro-batch's sum rounded once (by up to 2^-8 of it); sums over processes, norm and update stay float32.");
    v("betas", betas, config::any(), "AdamW's two betas.");
    v("adam_epsilon", adam_epsilon, config::range(0.0, 1.0), "AdamW's epsilon.");
    v("lora", lora, config::any(), "Group of the low-rank factors.");
    v("embeddings", embeddings, config::any(), "Group of the new embedding and head rows.");
    v("base", base, config::any(), "Group of the base's own weights (training from scratch).");
    v("schedule", schedule, config::one_of({"cosine", "linear", "constant"}), "Learning rate after warm-up.");
    v("warmup", warmup, config::range(0, 1e12), "Steps of linear warm-up.");
    v("min_lr_ratio", min_lr_ratio, config::range(0.0, 1.0), "Where cosine and linear end, as a share of the peak.");
    v("clip", clip, config::range(0.0, 1e9), "Largest global gradient norm; 0: off.");
    v("accumulation", accumulation, config::range(1, 1e6), "Micro-batches per optimizer step: its sequences are dealt to them, so that each holds about tokens_per_step / accumulation tokens.");
    v("memory_budget_gib", memory_budget_gib, config::range(0.0, 1e6), "Memory that a step may take (the process on the CPU, the device on a GPU); as few layers as it takes are computed again in the backward pass. 0: 0.94 of what the GPU has free at the start; on the CPU no limit.");
    v("prefix_cache_mib", prefix_cache_mib, config::range(0, 1 << 24), "Room for what the frozen base makes of captions, which come back every epoch (keys and values of every layer); full, it keeps what came first. 0: none.");
    v("precision", precision, config::one_of({"float32", "bf16"}), "Compute precision; masters stay float32.");
    v("base_weights", base_weights, config::one_of({"frozen", "full"}), "full: train the base itself (only with model.init or allow_text_drift).");
    v("log_every", log_every, config::range(1, 1e9), "Steps between lines of metrics.jsonl.");
    v("eval_every", eval_every, config::range(0, 1e12), "Steps between evaluations; 0: only at the end.");
    v("eval_tokens", eval_tokens, config::range(1, 1e12), "Tokens per evaluation.");
    v("early_stopping_patience", early_stopping_patience, config::range(0, 1e9),
      "End the run, saved, after so many evaluations in a row (eval_every) without a lower loss on data.eval; 0: off. Read the best with --checkpoint best.");
    v("sample_every", sample_every, config::range(0, 1e12), "Steps between sample pictures; 0: only at the end.");
    v("sample_prompts", sample_prompts, config::any(), "Prompts of the sample pictures.");
    v("allow_text_drift", allow_text_drift, config::any(), "Permit what changes text logits.");
    v("strict", strict, config::any(), "End the run, saved, at the first warning that it learns nothing (no labels of the new modality, a zero gradient, a constant loss, ...).");
  }
};

struct RunConfig {
  RunSection run;
  ModelSection model;
  std::map<std::string, ModalitySection> modalities;
  std::vector<adapters::AdapterConfig> adapters;
  EmbeddingSection embeddings;
  OtSection ot;
  data::DataConfig data;
  TrainSection train;
  routing::RoutingConfig routing;
  checkpoint::CheckpointConfig checkpoint;
  parallel::ParallelConfig parallel;
  template <class V>
  void visit_fields(V& v) {
    v("run", run, config::required(), "Where the run lives.");
    v("model", model, config::required(), "The base.");
    v("modalities", modalities, config::any(), "New modalities by name.");
    v("adapters", adapters, config::any(), "Adapters on the frozen base.");
    v("embeddings", embeddings, config::any(), "The new rows.");
    v("ot", ot, config::any(), "Gromov-Wasserstein settings of the initialisations.");
    v("data", data, config::any(), "Data.");
    v("train", train, config::any(), "The loop.");
    v("routing", routing, config::any(), "Routing statistics.");
    v("checkpoint", checkpoint, config::any(), "Checkpoints.");
    v("parallel", parallel, config::any(), "Several processes: torchrun, srun, mpirun or `moegraft launch`.");
  }
  void validate(const std::string& path) const;  // cross-field rules
};

}  // namespace moegraft::run
