// Putting a model together from a run's config, and opening runs and plain models.
#include "moegraft/graft/grafted_model.h"

#include "libtorch.h"

#include <algorithm>
#include <charconv>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/kernels/current_device.h"
#include "moegraft/kernels/device_numerics.h"
#include "moegraft/model/families.h"
#include "moegraft/model/thaw.h"
#include "moegraft/parallel/part.h"
#include "moegraft/run/run_dir.h"

namespace moegraft::graft {
namespace {

namespace fs = std::filesystem;

model::DecoderSpec spec_from_init(const model::InitConfig& init, const tokenizer::Tokenizer& tokenizer) {
  model::DecoderSpec s;
  s.family = init.family;
  s.vocab_size = init.vocab_size > 0 ? init.vocab_size : tokenizer.size();
  MOEGRAFT_CHECK_USAGE(s.vocab_size >= tokenizer.size(), "model.init.vocab_size must be at least the tokenizer's size ",
                       tokenizer.size(), ", got ", s.vocab_size);
  s.hidden_size = init.hidden_size;
  s.num_layers = init.num_layers;
  s.num_heads = init.num_heads;
  s.num_kv_heads = init.num_kv_heads;
  s.head_dim = init.head_dim;
  s.num_experts = init.num_experts;
  s.num_experts_per_tok = init.num_experts_per_tok;
  s.moe_intermediate_size = init.moe_intermediate_size;
  s.intermediate_size = init.intermediate_size > 0 ? init.intermediate_size : init.moe_intermediate_size;
  s.max_positions = init.max_positions;
  s.tie_word_embeddings = init.tie_word_embeddings;
  s.rope.theta = init.rope_theta;
  s.router_aux_loss_coef = init.router_aux_loss_coef;
  s.rms_norm_eps = 1e-6;
  s.router.renormalise = true;
  s.bos_id = tokenizer.bos_id();
  s.eos_id = tokenizer.eos_id();
  s.layers.assign(s.num_layers, {});
  return model::complete_spec(std::move(s));
}

std::vector<int64_t> modality_ids(const model::Vocabulary& vocabulary, const std::vector<std::string>& names) {
  std::vector<int64_t> ids;
  for (const auto& name : names) ids.push_back(name == "text" ? 0 : vocabulary.by_name(name).modality);
  return ids;
}

// Rows of zeros (float32 leaves) for each modality, attached and registered. build.cpp or a checkpoint fills them.
void add_rows(GraftedModel& m) {
  const int64_t D = m.decoder->spec().hidden_size;
  const auto options = at::TensorOptions(at::kFloat).device(m.device());
  for (const auto& tokens : m.vocabulary.modalities) {
    model::ModalityRows rows{
        tokens.modality, tokens.first_id, at::zeros({tokens.num_rows(), D}, options).set_requires_grad(true), {}};
    // New rows follow the base's tying of embedding and head.
    const bool tied = m.decoder->spec().tie_word_embeddings;
    rows.head_ND = tied ? rows.embedding_ND : at::zeros({tokens.num_rows(), D}, options).set_requires_grad(true);
    m.registry->add({"rows." + tokens.name + ".embedding", rows.embedding_ND, "embeddings", {tokens.modality}});
    if (!tied) m.registry->add({"rows." + tokens.name + ".head", rows.head_ND, "embeddings", {tokens.modality}});
    m.decoder->attach_rows(std::move(rows));
  }
}

void add_adapters(GraftedModel& m, const std::vector<adapters::AdapterConfig>& configs,
                  std::pair<int64_t, int64_t> experts) {
  if (configs.empty()) return;
  m.adapters = std::make_shared<adapters::AdapterStack>();
  for (size_t i = 0; i < configs.size(); ++i) {
    auto adapter = adapters::make_adapter({m.decoder->spec(), configs[i], int64_t(i),
                                           modality_ids(m.vocabulary, configs[i].modality), m.device(), experts});
    adapter->register_parameters(*m.registry);
    m.adapters->add(std::move(adapter));
  }
  m.decoder->attach(m.adapters);
}

// Codecs tell the size of each modality; an opened run knows it from vocabulary.json and can do without them.
void add_vocabulary(GraftedModel& m, const std::map<std::string, ModalityConfig>& modalities, bool with_codecs) {
  const auto& s = m.decoder->spec();
  m.vocabulary.text_size = s.vocab_size;
  m.vocabulary.bos_id = s.bos_id;
  m.vocabulary.eos_id = s.eos_id;
  const auto stored = m.path.empty() ? std::nullopt : read_vocabulary(m.path);
  if (stored) {
    MOEGRAFT_CHECK(stored->text_size == s.vocab_size, (m.path / "vocabulary.json").string(), " belongs to a base with ",
                   stored->text_size, " text ids; ", m.base_path.string(), " has ", s.vocab_size);
    m.vocabulary = *stored;
  }
  int64_t next = s.vocab_size, modality = 0;
  for (const auto& [name, section] : modalities) {
    ++modality;
    if (stored && !with_codecs) continue;
    std::shared_ptr<codec::Codec> codec = codec::load_codec(section.codec);
    codec->to(m.device());
    model::ModalityTokens tokens{
        name, modality, next, codec->num_codes(), codec->item_length(), codec->shape().codebooks};
    if (stored) {
      const auto& was = m.vocabulary.by_name(name);
      MOEGRAFT_CHECK(was.num_codes == tokens.num_codes && was.item_length == tokens.item_length &&
                         was.codebooks == tokens.codebooks,
                     "modalities.", name, ".codec: the run was trained with ", was.num_codes, " codes in ",
                     was.codebooks, " codebook(s) and ", was.item_length, " per item, ", section.codec, " has ",
                     tokens.num_codes, " in ", tokens.codebooks, " and ", tokens.item_length);
    } else {
      m.vocabulary.modalities.push_back(tokens);
    }
    next += tokens.num_rows();
    m.codecs[name] = std::move(codec);
  }
}

fs::path find_checkpoint(const fs::path& root, const std::string& which) {
  std::optional<fs::path> found;
  int64_t step = 0;
  if (which == "latest")
    found = checkpoint::find_latest(root);
  else if (which == "best")
    found = checkpoint::find_best(root);
  else if (auto [end, error] = std::from_chars(which.data(), which.data() + which.size(), step);
           error == std::errc() && end == which.data() + which.size())
    found = root / checkpoint::step_name(step);
  else
    found = fs::path(which);
  if (found && fs::is_directory(*found)) return *found;
  std::vector<std::string> known;
  for (const auto& dir : checkpoint::list_checkpoints(root)) known.push_back(dir.filename().string());
  fail("no checkpoint '", shortened(which), "' in ", root.string(),
       known.empty()     ? ": the run has saved none yet"
       : which == "best" ? ": none was measured; it holds "
                         : ": it holds ",
       join(known, ", "));
}

}  // namespace

const codec::ImageCodec* find_image_codec(const GraftedModel& m, const std::string& modality) {
  const auto found = m.codecs.find(modality);
  if (found == m.codecs.end() || !found->second) return nullptr;
  const auto* images = dynamic_cast<const codec::ImageCodec*>(found->second.get());
  MOEGRAFT_CHECK(images, "the codec of ", modality, " (", found->second->architecture(),
                 ") is not one of images: name a modality of images");
  return images;
}

at::Device device_of(config::Device device) {
  if (device == config::Device::cpu) return at::kCPU;
  const bool available = torch::cuda::is_available();
  MOEGRAFT_CHECK(device == config::Device::automatic || available,
                 "device cuda was asked for, but this build or machine has none; use cpu or auto");
  if (available) kernels::set_device_numerics();
  return available ? kernels::current_device(at::kCUDA) : at::Device(at::kCPU);
}

at::Device choose_device(config::Device choice, int64_t local_rank, int64_t local_world_size) {
  const at::Device device = device_of(choice);
  if (!device.is_cuda()) return device;
  const int64_t present = int64_t(torch::cuda::device_count());
  MOEGRAFT_CHECK(local_world_size <= present, local_world_size,
                 " processes on this machine need a GPU each, there are ", present,
                 "; start fewer, or set model.device: cpu");
  const at::Device own(at::kCUDA, c10::DeviceIndex(local_rank));
  kernels::make_current(own);
  return own;
}

at::ScalarType parse_dtype(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16" || name == "bf16") return at::kBFloat16;
  fail<UsageError>("the dtype must be float32 or bfloat16, got '", name, "'");
}

GraftedModel assemble_model(const run::RunConfig& config, const OpenOptions& options) {
  GraftedModel m;
  m.config = config;
  if (run::is_run(config.run.dir)) m.path = config.run.dir;
  m.registry = std::make_unique<model::ParameterRegistry>();
  const at::Device device = device_of(options.device.value_or(config.model.device));
  const at::ScalarType dtype = options.dtype.value_or(parse_dtype(config.model.dtype));
  std::pair<int64_t, int64_t> experts{0, 0};  // here; all
  const bool base_trains = config.train.base_weights == train::BaseWeights::full;
  MOEGRAFT_CHECK_USAGE(
      !base_trains || (dtype == at::kFloat && device == at::kCPU),
      "a base that trains runs in float32 on the CPU for now; open its model folder for other dtypes and devices");
  if (config.model.init) {
    m.tokenizer = tokenizer::load_tokenizer(config.model.init->tokenizer);
    model::BaseModel base = model::init_base(spec_from_init(*config.model.init, *m.tokenizer),
                                             {config.model.init->embedding_std, uint64_t(config.run.seed)});
    model::register_base(base, *m.registry);
    m.decoder = std::make_unique<model::Decoder>(std::move(base));
  } else if (base_trains) {
    m.base_path = config.model.path;
    model::BaseModel base = model::thaw_base(model::load_base(config.model.path));
    model::register_base(base, *m.registry);
    m.decoder = std::make_unique<model::Decoder>(std::move(base));
    m.tokenizer = tokenizer::load_tokenizer(config.model.path);
  } else {
    m.base_path = config.model.path;
    model::LoadOptions load{
        dtype, device,
        options.experts.value_or(config.model.offload == model::Offload::experts ? model::Experts::offloaded
                                                                                 : model::Experts::resident)};
    load.quantise = model::weight_format(options.quantize.value_or(config.model.quantize));
    if (options.mesh) {
      parallel::Part part = parallel::load_part(config.model.path, load, *options.mesh, config.parallel.shard_base);
      experts = part.experts;
      m.sharded = std::move(part.sharded);
      m.decoder = std::make_unique<model::Decoder>(std::move(part.base));
      m.decoder->set_dispatcher(std::move(part.dispatcher));
    } else {
      m.decoder = std::make_unique<model::Decoder>(model::load_base(config.model.path, load));
    }
    m.tokenizer = tokenizer::load_tokenizer(config.model.path);
  }
  add_vocabulary(m, config.modalities, options.with_codecs);
  add_rows(m);
  add_adapters(m, config.adapters, experts);
  return m;
}

GraftedModel open_model(const fs::path& path, const OpenOptions& options) {
  MOEGRAFT_CHECK(fs::exists(path), path.string(), " does not exist");
  if (run::is_run(path)) {
    run::RunConfig config = run::load_run_config(path);
    config.run.dir = path.string();  // the folder may have been moved
    if (options.check_identity)
      run::check_identity(
          path, run::take_fingerprints(config, options.with_codecs ? run::Parts::model_and_codecs : run::Parts::model),
          config);
    const fs::path from = find_checkpoint(path / "checkpoints", options.checkpoint);
    GraftedModel m = assemble_model(config, options);
    const checkpoint::Checkpoint saved = checkpoint::load(from);
    checkpoint::load_parameters(*m.registry, saved.parameters);
    m.step = saved.step;
    return m;
  }
  MOEGRAFT_CHECK(fs::exists(path / "config.json"), path.string(),
                 " is neither a run (config.yaml) nor a Hugging Face model (config.json)");
  MOEGRAFT_CHECK_USAGE(options.checkpoint == "latest", path.string(), " is a model, not a run: it has no checkpoint \"",
                       options.checkpoint, "\"; leave --checkpoint out");
  GraftedModel m;
  m.path = m.base_path = path;
  m.registry = std::make_unique<model::ParameterRegistry>();
  model::LoadOptions load{options.dtype.value_or(at::kFloat),
                          device_of(options.device.value_or(config::Device::automatic))};
  load.quantise = model::weight_format(options.quantize.value_or(model::Quantize::none));
  m.decoder = std::make_unique<model::Decoder>(model::load_base(path, load));
  const auto& s = m.decoder->spec();
  m.vocabulary = {s.vocab_size, s.bos_id, s.eos_id, {}};
  if (fs::exists(path / "tokenizer.json") || fs::exists(path / "tokenizer.model"))
    m.tokenizer = tokenizer::load_tokenizer(path);
  return m;
}

}  // namespace moegraft::graft
