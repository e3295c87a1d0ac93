#pragma once
// A whole small world on disk for end-to-end tests: tokenizer, base model, codec, pictures with captions, shards, a
// graft's config. Nothing is trained, everything is a function of the seed, and making it takes about a second.

#include <filesystem>
#include <string>
#include <vector>

#include "moegraft/io/safetensors.h"
#include "moegraft/run/run_config.h"

namespace moegraft::testing {

// A folder that is removed at the end.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name = "moegraft");
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

struct TinyOptions {
  std::string family = "qwen3_moe";
  bool tied = false;
  int64_t layers = 2;
  uint64_t seed = 3;
};

struct TinyWorld {
  std::filesystem::path dir;
  std::filesystem::path tokenizer;  // folder: sentencepiece BPE, about 300 pieces
  std::filesystem::path base;       // Hugging Face directory with tokenizer: 2 layers, width 32, 4 experts top-2
  std::filesystem::path
      codec;  // 12x12 pictures <-> 2x2 codes out of 16; random convolutions, codebook by k-means on the pictures
  std::filesystem::path manifest;      // JSONL: 16 pictures (4 colours x 4 shapes) with captions such as "a red disc"
  std::filesystem::path image_shards;  // those, tokenised
  std::filesystem::path text_file, text_shards;  // 24 lines
  run::RunConfig config;                         // a graft of 4 short steps into dir/run, rank 4 on every site
  std::filesystem::path yaml;                    // the same as a file
  std::filesystem::path run;                     // dir/run; made by training or write_run
};

// Writes everything below `dir` (made when missing).
TinyWorld make_tiny_world(const std::filesystem::path& dir, const TinyOptions& options = {});

// Makes the run directory of world.config without training: rows and adapters as the config initialises them, at step
// 0. With large > 0 every trained tensor (factors A and B, embedding and head rows) is overwritten by normal numbers of
// that standard deviation. Returns world.run.
std::filesystem::path write_run(const TinyWorld& world, double large = 0, uint64_t seed = 9);

// The trained tensors of a run's newest checkpoint, and a new checkpoint of the same step with others in their place.
io::TensorMap read_parameters(const std::filesystem::path& run);
void replace_parameters(const std::filesystem::path& run, const io::TensorMap& parameters);
// Every tensor of the run's newest checkpoint becomes normal numbers of standard deviation `large`.
void randomise_parameters(const std::filesystem::path& run, double large, uint64_t seed = 9);

}  // namespace moegraft::testing
