#pragma once
// The `data` section of a run.

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moegraft/config/config.h"
#include "moegraft/config/shared_choices.h"

namespace moegraft::data {

struct SourceConfig {
  std::string path;     // a shard (.safetensors) or a folder of shards, as `moegraft data prepare` writes them
  double weight = 1.0;  // relative share of documents drawn from it
  std::string sample_by = "document";
  std::optional<bool> add_bos = std::nullopt;  // else data.add_bos
  template <class V>
  void visit_fields(V& v) {
    v("path", path, config::required(config::path()), "A shard or a folder of shards.");
    v("weight", weight, config::range(0.0, 1e6), "Relative share of the documents drawn from this source.");
    v("sample_by", sample_by, config::one_of({"document", "item"}),
      "document: an epoch is every document once. item: every item once (a picture that has several captions, each a "
      "document), with one of its documents, drawn anew each epoch.");
    v("add_bos", add_bos, config::any(),
      "data.add_bos for this source alone (false where its documents begin with BOS themselves).");
  }
};

using config::Packing;

// What documents a step is made of.
enum class Batching { mixed, modality };
inline constexpr config::Named<Batching> kBatchings[] = {{Batching::mixed, "mixed"}, {Batching::modality, "modality"}};
constexpr std::span<const config::Named<Batching>> choices_of(Batching) { return kBatchings; }

struct DataConfig {
  std::vector<SourceConfig> train, eval;
  int64_t sequence_length = 512;
  int64_t tokens_per_step = 8192;
  int64_t prefetch = 4;
  Packing packing = Packing::documents;
  Batching batching = Batching::mixed;
  double caption_dropout = 0.0;
  double caption_noise = 0.0;
  double code_noise = 0.0;
  bool caption_labels = false;
  bool add_bos = true;
  bool add_eos = true;
  template <class V>
  void visit_fields(V& v) {
    v("train", train, config::any(), "Training sources.");
    v("eval", eval, config::any(), "Held-out sources.");
    v("sequence_length", sequence_length, config::range(2, 1 << 24), "Longest sequence in tokens.");
    v("tokens_per_step", tokens_per_step, config::range(2, 1 << 28),
      "Tokens of one optimizer step, over all processes and accumulation micro-batches.");
    v("prefetch", prefetch, config::range(0, 1024),
      "Steps whose batches a background thread keeps ready; 0: they are made when the step asks for them. Changes no "
      "batch.");
    v("packing", packing, config::any(),
      "documents: each document is a sequence of its own. stream: text documents are joined and cut every "
      "sequence_length tokens.");
    v("batching", batching, config::any(),
      "mixed: steps of documents as they are drawn. modality: every step's documents have the same modalities (text, "
      "or text and images, ...), so that all "
      "processes do the same work; the documents of up to 64 steps (at most one pass over the data) are drawn ahead, "
      "sorted by length and cut into steps, which are shuffled.");
    v("caption_dropout", caption_dropout, config::range(0.0, 1.0),
      "Share of captioned images whose caption is dropped (for classifier-free guidance).");
    v("caption_noise", caption_noise, config::range(0.0, 1.0),
      "Share of the text tokens beside another modality that the model reads as random ones of the text vocabulary, so "
      "that a picture is found from some of the words of its caption, "
      "in any words around them.");
    v("code_noise", code_noise, config::range(0.0, 1.0),
      "Share of another modality's codes that the model reads as random ones of the codebook; it still learns the true "
      "ones. What follows is then found from the caption rather than "
      "from the codes before it, and a wrong code drawn does less harm.");
    v("caption_labels", caption_labels, config::any(),
      "Also train on the text of documents that hold another modality.");
    v("add_bos", add_bos, config::any(), "Begin documents with the tokenizer's BOS where it has one.");
    v("add_eos", add_eos, config::any(), "End text documents with EOS.");
  }
};

}  // namespace moegraft::data
