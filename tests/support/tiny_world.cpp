#include "support/tiny_world.h"

#include "libtorch.h"

#include <cstdlib>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/parameters.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/codec/train.h"
#include "moegraft/codec/vq.h"
#include "moegraft/data/prepare.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/graft/vocabulary_file.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"
#include "moegraft/model/weights.h"
#include "moegraft/run/run_dir.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace fs = std::filesystem;

namespace moegraft::testing {
namespace {

constexpr int64_t kSize = 12;
const std::vector<std::string> kColours = {"red", "green", "blue", "black"},
                               kShapes = {"disc", "bar", "cross", "frame"};

std::string text_lines() {
  std::string text;
  for (const auto& colour : kColours)
    for (const auto& shape : kShapes) text += "a " + colour + " " + shape + " lies on the table\n";
  text +=
      "a table is a piece of furniture with a flat top\nthe cross is a mark of two lines that meet\na bar of soap lay "
      "in the frame of the window\n"
      "red, green and blue are the colours of light\nblack is the absence of light\na disc is round and flat\nthe "
      "quick brown fox jumps over the lazy dog\n"
      "numbers such as 1, 2, 3 and 10 are words too\n";
  return text;
}

// One shape on white, the colour's channels at 40 or 220.
at::Tensor draw(size_t colour, size_t shape) {
  const at::Tensor axis = at::arange(kSize), y = axis.view({kSize, 1}) - kSize / 2,
                   x = axis.view({1, kSize}) - kSize / 2;
  const at::Tensor inside = shape == 0   ? x.square() + y.square() < 18
                            : shape == 1 ? (y.abs() < 2).logical_and(x.abs() < 6)
                            : shape == 2 ? (x - y).abs().lt(2).logical_or((x + y).abs().lt(2))
                                         : at::maximum(x.abs(), y.abs()) >= 4;
  at::Tensor picture = at::full({3, kSize, kSize}, 255, at::kByte);
  for (int64_t c = 0; c < 3; ++c)
    picture[c].masked_fill_(inside.expand({kSize, kSize}), int64_t(colour) == c ? 220 : 40);
  return picture;
}

void write_pictures(const fs::path& dir) {
  fs::create_directories(dir / "images");
  std::string manifest;
  for (size_t c = 0; c < kColours.size(); ++c)
    for (size_t s = 0; s < kShapes.size(); ++s) {
      const std::string file = "images/" + kColours[c] + "-" + kShapes[s] + ".png";
      io::save_image(dir / file, draw(c, s));
      manifest += io::Json{{"image", file}, {"text", "a " + kColours[c] + " " + kShapes[s]}}.dump() + "\n";
    }
  io::write_file_atomic(dir / "pictures.jsonl", manifest);
}

void write_codec(const TinyWorld& world, uint64_t seed) {
  codec::VqConfig c;
  c.image_size = kSize, c.patch = 3, c.channels = {8, 16}, c.encoder_blocks = {1, 0}, c.decoder_blocks = {1, 1};
  c.mixer_blocks = 1, c.mixer_width = 24, c.codebook_size = 16, c.code_width = 4;
  codec::VqCodec codec(c, seed);
  const auto pictures = codec::load_pictures(world.manifest, kSize, c.fit);
  codec.set_codebook(codec::fit_codebook(codec.embed(codec::to_float(pictures.pixels_N3HW)).reshape({-1, c.code_width}),
                                         c.codebook_size, 8, seed));
  codec.save(world.codec);
}

void write_base(const TinyWorld& world, const TinyOptions& options) {
  const auto tokenizer = tokenizer::load_tokenizer(world.tokenizer);
  model::DecoderSpec s;
  s.family = options.family;
  s.vocab_size = tokenizer->size() + 5;  // more than the tokenizer has: new ids start behind config.vocab_size
  s.hidden_size = 32, s.num_layers = options.layers, s.num_heads = 4, s.num_kv_heads = 2, s.head_dim = 8;
  s.moe_intermediate_size = s.intermediate_size = 24, s.num_experts = 4, s.num_experts_per_tok = 2,
  s.router.renormalise = true;
  s.layers.assign(size_t(options.layers), {});
  s.max_positions = 256, s.tie_word_embeddings = options.tied, s.initializer_range = 0.2;
  s.bos_id = tokenizer->bos_id(), s.eos_id = tokenizer->eos_id();
  model::save_base(model::init_base(model::complete_spec(s), {1.0, options.seed}), world.base, at::kFloat);
  for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"})
    if (fs::exists(world.tokenizer / name)) fs::copy_file(world.tokenizer / name, world.base / name);
}

run::RunConfig graft_config(const TinyWorld& w) {
  run::RunConfig c;
  c.run = {w.run.string(), 17};
  c.model.path = w.base.string();
  c.model.device = config::Device::cpu;
  c.modalities["image"].codec = w.codec.string();
  adapters::AdapterConfig lora;
  lora.rank = 4, lora.alpha = 8;
  c.adapters = {lora};
  c.data.train = {{w.image_shards.string(), 1.0}, {w.text_shards.string(), 0.25}};
  c.data.eval = {{w.image_shards.string(), 1.0}, {w.text_shards.string(), 1.0}};
  c.data.sequence_length = 64, c.data.tokens_per_step = 128, c.data.caption_dropout = 0.1;
  auto& t = c.train;
  t.steps = 4, t.warmup = 1, t.log_every = 1, t.eval_tokens = 512, t.lora.lr = 1e-2, t.embeddings.lr = 1e-2;
  t.sample_prompts = {"a red disc"};
  c.checkpoint = {2, 3, true};
  c.routing.every = 2;
  return c;
}

at::Tensor normal_like(const at::Tensor& t, double std, uint64_t seed, uint64_t index) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(Rng(seed, "tiny_world", index).derive_seed());
  return at::empty(t.sizes(), at::kFloat).normal_(0.0, std, generator);
}

void randomise(io::TensorMap& tensors, double std, uint64_t seed) {
  uint64_t index = 0;
  for (auto& [name, tensor] : tensors) tensor = normal_like(tensor, std, seed, index++);
}

}  // namespace

TemporaryFolder::TemporaryFolder(const std::string& name) {
  std::string pattern = (fs::temp_directory_path() / (name + "-XXXXXX")).string();
  MOEGRAFT_CHECK(mkdtemp(pattern.data()) != nullptr, "cannot make a temporary folder like ", pattern);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

TinyWorld make_tiny_world(const fs::path& dir, const TinyOptions& options) {
  const at::NoGradGuard no_grad;
  TinyWorld w;
  w.dir = dir;
  w.tokenizer = dir / "tokenizer", w.base = dir / "base", w.codec = dir / "codec", w.run = dir / "run";
  w.manifest = dir / "pictures.jsonl", w.image_shards = dir / "shards" / "image",
  w.text_shards = dir / "shards" / "text", w.text_file = dir / "text.txt";
  fs::create_directories(dir);
  io::write_file_atomic(w.text_file, text_lines());
  tokenizer::SentencePieceTraining training;
  training.vocab_size = 320;
  tokenizer::train_sentencepiece({w.text_file}, w.tokenizer, training);
  write_base(w, options);
  write_pictures(dir);
  write_codec(w, options.seed);
  data::ShardOptions shards;
  shards.tokenizer = w.tokenizer;
  shards.texts = {w.text_file};
  shards.output = w.text_shards;
  data::prepare_shards(shards);
  shards.texts.clear();
  shards.manifests = {w.manifest};
  shards.codec = w.codec;
  shards.output = w.image_shards;
  data::prepare_shards(shards);
  w.config = graft_config(w);
  w.config.validate("");
  w.yaml = dir / "graft.yaml";
  io::write_file_atomic(w.yaml, config::dump(w.config));
  return w;
}

fs::path write_run(const TinyWorld& world, double large, uint64_t seed) {
  const graft::GraftedModel model = graft::build_model(world.config);
  const run::RunDir dir =
      run::RunDir::create(world.config, run::take_fingerprints(world.config, run::Parts::model_and_codecs));
  graft::write_vocabulary(dir.path(), model.vocabulary);
  io::TensorMap parameters = checkpoint::parameter_tensors(*model.registry);
  if (large > 0) randomise(parameters, large, seed);
  checkpoint::TrainState state;
  state.seed = world.config.run.seed;
  checkpoint::CheckpointWriter(dir.checkpoints(), world.config.checkpoint)
      .save(0, checkpoint::whole(parameters), {}, checkpoint::to_json(state));
  return world.run;
}

io::TensorMap read_parameters(const fs::path& run) {
  const auto latest = checkpoint::find_latest(run / "checkpoints");
  MOEGRAFT_CHECK(latest.has_value(), run.string(), " has no checkpoint");
  return checkpoint::load(*latest).parameters;
}

void replace_parameters(const fs::path& run, const io::TensorMap& parameters) {
  const auto latest = checkpoint::find_latest(run / "checkpoints");
  MOEGRAFT_CHECK(latest.has_value(), run.string(), " has no checkpoint");
  const checkpoint::Checkpoint old = checkpoint::load(*latest);
  checkpoint::CheckpointWriter(run / "checkpoints", {1, 1000, true})
      .save(old.step, checkpoint::whole(parameters), checkpoint::whole(old.optimizer), old.state, old.measure);
}

void randomise_parameters(const fs::path& run, double large, uint64_t seed) {
  io::TensorMap parameters = read_parameters(run);
  randomise(parameters, large, seed);
  replace_parameters(run, parameters);
}

}  // namespace moegraft::testing
