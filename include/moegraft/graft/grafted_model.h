#pragma once
// A base with everything that was grafted onto it: new rows, adapters, tokenizer, codecs. What train, generate, eval,
// export and logits work on.

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "moegraft/adapters/adapter.h"
#include "moegraft/codec/codec.h"
#include "moegraft/distributed/world.h"
#include "moegraft/model/decoder.h"
#include "moegraft/model/registry.h"
#include "moegraft/model/vocabulary.h"
#include "moegraft/model/weights.h"
#include "moegraft/run/run_config.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::parallel {
class ShardedWeights;  // parallel/sharded_weights.h
}

namespace moegraft::graft {

struct OpenOptions {
  std::optional<at::ScalarType> dtype;      // default: the run's, or float32 for a plain model
  std::optional<model::Quantize> quantize;  // default: the run's, or none
  std::optional<config::Device> device;     // default: the run's, or auto
  std::string checkpoint = "latest";        // "latest", "best", a step number, or a checkpoint directory (runs only)
  bool with_codecs = true;                  // false: do not load image codecs (ids only)
  bool check_identity = true;               // false: this process has compared the run's fingerprints already
  std::optional<model::Experts> experts;    // of a frozen base; default: where model.offload says
  const distributed::Mesh* mesh = nullptr;  // the processes that hold the model together (config.parallel), to train it
};

// Built by build_model (a new run) or open_model (an existing run, or a plain Hugging Face directory). Movable only.
struct GraftedModel {
  std::filesystem::path path;            // the run or model directory
  std::optional<run::RunConfig> config;  // runs only
  std::filesystem::path base_path;       // the Hugging Face directory of the base; empty when trained from scratch
  std::unique_ptr<model::Decoder> decoder;
  std::shared_ptr<parallel::ShardedWeights>
      sharded;                   // the base's weights where processes share them (parallel.shard_base); null otherwise
  model::Vocabulary vocabulary;  // text_size is config.vocab_size
  std::shared_ptr<tokenizer::Tokenizer> tokenizer;              // null when the directory has none
  std::map<std::string, std::shared_ptr<codec::Codec>> codecs;  // by modality name
  std::shared_ptr<adapters::AdapterStack> adapters;             // null when there is none
  std::unique_ptr<model::ParameterRegistry> registry;           // overlays (and the base's own leaves when it trains)
  int64_t step = 0;                                             // of the checkpoint that was loaded
  std::string init_report_json = "{}";                          // build_model: what the initialisations did

  bool is_graft() const { return !vocabulary.modalities.empty(); }
  at::Device device() const { return decoder->device(); }
};

// The codec of a modality of images; null when it was not loaded. UserError when the modality's codec is of another
// kind.
const codec::ImageCodec* find_image_codec(const GraftedModel& model, const std::string& modality);

at::Device device_of(config::Device device);  // UserError when cuda is asked for and there is none; sets its numerics
                                              // (kernels/device_numerics.h)
// The device of one of several processes on this machine; makes it the calling thread's current one. UserError: more
// processes than GPUs.
at::Device choose_device(config::Device choice, int64_t local_rank, int64_t local_world_size);
at::ScalarType parse_dtype(const std::string& name);  // float32 | bfloat16 | bf16; UsageError otherwise

// Shapes and zeros only: a model for `config` whose overlays are not initialised yet.
GraftedModel assemble_model(const run::RunConfig& config, const OpenOptions& options = {});

// assemble_model, then initialises rows and factors as config says (calibrating on config.data where GW needs it), or
// from init_from.
GraftedModel build_model(const run::RunConfig& config, const OpenOptions& options = {});
// Whether build_model runs the model for an initialisation, and so needs its experts.
bool initialises_by_running(const std::vector<adapters::AdapterConfig>& adapters);

// A run directory (config.yaml + checkpoints) or a Hugging Face model directory. UserError says what the path lacks.
GraftedModel open_model(const std::filesystem::path& path, const OpenOptions& options = {});

}  // namespace moegraft::graft
