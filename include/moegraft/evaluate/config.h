#pragma once
// eval.yaml: what `moegraft eval` measures. Everything is optional; a section that is absent is not measured.

#include <optional>
#include <string>
#include <vector>

#include "moegraft/config/config.h"
#include "moegraft/config/shared_choices.h"

namespace moegraft::evaluate {

std::vector<std::string> quantize_choices();  // auto, and model.quantize's

struct TextSection {
  std::vector<std::string> shards;
  int64_t max_tokens = 32768;
  config::Packing packing = config::Packing::stream;
  template <class V>
  void visit_fields(V& v) {
    v("shards", shards, config::path(), "Text shards.");
    v("max_tokens", max_tokens, config::range(1, 1e12), "Tokens to look at.");
    v("packing", packing, config::any(),
      "stream: documents joined and cut every `sequence_length` tokens, as perplexity is usually given. documents: "
      "each a sequence of its own, whose first words have nothing to go by. The two do not compare.");
  }
};

struct ImageSection {
  std::string name, shards;
  int64_t max_items = 256;
  template <class V>
  void visit_fields(V& v) {
    v("name", name, config::required(), "What the result is called.");
    v("shards", shards, config::required(config::path()), "Shards of captioned pictures.");
    v("max_items", max_items, config::range(2, 1e9), "Pictures to look at, spread evenly over the shards.");
  }
};

struct CodecSection {
  std::string name, pictures;
  int64_t max_items = 1024;
  template <class V>
  void visit_fields(V& v) {
    v("name", name, config::required(), "What the result is called.");
    v("pictures", pictures, config::required(config::path()), "Manifest, folder of PNG/JPEG files, or one picture.");
    v("max_items", max_items, config::range(1, 1e9), "Pictures to look at, spread evenly.");
  }
};

struct RetrievalSection {
  std::string name, manifest, candidates, sheet;
  int64_t n = 100, seed = 17, top_k = 0;
  double temperature = 0, top_p = 1, cfg = 1;
  template <class V>
  void visit_fields(V& v) {
    v("name", name, config::required(), "What the result is called.");
    v("manifest", manifest, config::required(config::path()),
      "Manifest whose captions are the prompts: JSONL, CSV, ImageFolder, WebDataset tars, Parquet or Arrow files.");
    v("candidates", candidates, config::path(),
      "Manifest of further pictures to choose among; empty: the manifest's own.");
    v("n", n, config::range(1, 1e9), "Prompts, drawn from the manifest by `seed`; all when it holds fewer.");
    v("seed", seed, config::range(0, 9e15), "Seed of the choice and of the sampling.");
    v("temperature", temperature, config::range(0.0, 100.0), "0: the likeliest codes.");
    v("top_k", top_k, config::range(0, 1 << 30), "0: off.");
    v("top_p", top_p, config::range(0.0, 1.0), "1: off.");
    v("cfg", cfg, config::range(0.0, 1000.0), "Guidance; 1: off.");
    v("sheet", sheet, config::path(), "Picture to write: sample beside original. Empty: none.");
  }
};

struct RankingSection {
  std::string name, manifest, direction = "both";
  int64_t n = 64, candidates = 64, seed = 17;
  template <class V>
  void visit_fields(V& v) {
    v("name", name, config::required(), "What the result is called.");
    v("manifest", manifest, config::required(config::path()), "Manifest of captioned pictures.");
    v("direction", direction, config::one_of({"both", "image_to_caption", "caption_to_image"}),
      "Which caption of many a picture has, which picture of many a caption has, or both.");
    v("n", n, config::range(1, 1e9),
      "Captions and pictures to ask about, drawn from the manifest by `seed`; all when it holds fewer.");
    v("candidates", candidates, config::range(2, 1e9),
      "Captions or pictures to choose among, the right one included. Each pair is a pass over a caption and a picture: "
      "about n * candidates of them a direction.");
    v("seed", seed, config::range(0, 9e15), "Seed of the choice.");
  }
};

struct BaselineSection {
  std::string manifest;
  bool states = true;
  int64_t max_pictures = 20000, max_words = 4096, seed = 17;
  template <class V>
  void visit_fields(V& v) {
    v("manifest", manifest, config::required(config::path()),
      "Manifest of the pictures to learn from, with all their captions: what the graft was trained on.");
    v("states", states, config::any(), "Also a ridge regression from the base's states of a caption.");
    v("max_pictures", max_pictures, config::range(10, 1e9),
      "Pictures to learn from, drawn by `seed` where the manifest holds more.");
    v("max_words", max_words, config::range(1, 65536),
      "Most frequent words that the bag of words knows; the normal equations are as wide.");
    v("seed", seed, config::range(0, 9e15), "Seed of that, and of the tenth of the pictures that chooses the penalty.");
  }
};

struct DriftSection {
  std::vector<std::string> dtypes = {"float32", "bfloat16"};
  int64_t seed = 17;
  template <class V>
  void visit_fields(V& v) {
    v("dtypes", dtypes, config::any(), "Compute types to try: float32, bfloat16.");
    v("seed", seed, config::range(0, 9e15), "Seed of the token ids.");
  }
};

struct RoutingSection {
  int64_t max_tokens = 8192;
  bool start = true;
  template <class V>
  void visit_fields(V& v) {
    v("max_tokens", max_tokens, config::range(1, 1e12), "Tokens of `text` and `images` to route.");
    v("start", start, config::any(), "Also measure the run as it was before training.");
  }
};

struct EvalConfig {
  std::string checkpoint = "latest", dtype = "auto", quantize = "auto", modality;
  config::Device device = config::Device::automatic;
  int64_t sequence_length = 0;
  std::optional<TextSection> text;
  std::vector<ImageSection> images;
  std::vector<std::string> unigram;
  std::vector<CodecSection> codec;
  std::vector<RetrievalSection> retrieval;
  std::optional<BaselineSection> baselines;
  std::vector<RankingSection> ranking;
  std::optional<DriftSection> drift;
  std::optional<RoutingSection> routing;
  template <class V>
  void visit_fields(V& v) {
    v("checkpoint", checkpoint, config::any(), "latest, best, a step, or a checkpoint directory (runs).");
    v("dtype", dtype, config::one_of({"auto", "float32", "bfloat16"}),
      "Compute type; auto: the run's, float32 for a plain model.");
    v("quantize", quantize, config::one_of(quantize_choices()),
      "How the base's matrices are stored (model.quantize); auto: as the run says, none for a plain model.");
    v("device", device, config::any(), "Where to run.");
    v("modality", modality, config::any(), "The image modality; empty: the only one.");
    v("sequence_length", sequence_length, config::range(0, 1 << 24), "Longest sequence; 0: the run's, or 512.");
    v("text", text, config::any(), "Text perplexity.");
    v("images", images, config::any(), "Likelihood of pictures, with true, dropped and shuffled captions.");
    v("unigram", unigram, config::path(), "Shards the unigram baseline is counted on; empty: the run's data.train.");
    v("codec", codec, config::any(), "Reconstruction by the codec.");
    v("retrieval", retrieval, config::any(), "Is the picture nearest to a drawn one the right one?");
    v("baselines", baselines, config::any(),
      "How far a linear regression from captions to pictures gets on `retrieval`, on the same prompts and pictures.");
    v("ranking", ranking, config::any(), "Which of many captions or pictures has the best likelihood?");
    v("drift", drift, config::any(), "Text logits of the graft against its base.");
    v("routing", routing, config::any(), "Routing by modality.");
  }
  void validate(const std::string& path) const;  // names distinct, dtypes known, routing and baselines have data
};

}  // namespace moegraft::evaluate
