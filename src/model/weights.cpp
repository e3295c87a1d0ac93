// Hugging Face directories: reading (memory-mapped), making from scratch, writing.
#include "moegraft/model/weights.h"

#include "libtorch.h"

#include <mutex>

#include "family.h"
#include "loader.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/config.h"
#include "moegraft/model/offload.h"
#include "moegraft/model/random_base.h"
#include "moegraft/model/thaw.h"
#include "moegraft/kernels/cpu.h"
#include "resident_weights.h"
#include "tensor_slots.h"

namespace moegraft::model {

std::optional<kernels::WeightFormat> weight_format(Quantize quantize) {
  if (quantize == Quantize::none) return std::nullopt;
  for (const auto& row : kernels::kWeightFormats)
    if (row.quantised() && row.name == config::name_of(quantize)) return row.value;
  fail<InvariantError>("model.quantize: ", config::name_of(quantize), " has no row in kernels/weight_format.h");
}

namespace {

namespace fs = std::filesystem;

bool is_quantisable(const LoadOptions& options, TensorRole role) { return options.quantise && is_linear_layer(role); }

// A layer's tensors but its experts'.
LayerWeights load_layer(Loader& load, const TensorSource& source, const DecoderSpec& s, const Family& family,
                        const LoadOptions& options, int64_t l) {
  LayerWeights layer;
  for (const TensorRow& row : family.tensors) {
    if (row.scope != TensorScope::layer) continue;
    const std::string name = tensor_name(row.name, l);
    load.keep_dtype(row.role == TensorRole::router_correction ? std::optional(at::kFloat)
                    : is_quantisable(options, row.role)       ? std::nullopt
                                                              : std::optional(options.dtype));
    if (row.present(s, s.layers[size_t(l)]))
      slot(layer, row.role).set(load.take(name, row.shape(s)));
    else if (name.ends_with(".bias") && source.contains(name))
      load.problem(name + " is present, but config.json says that there are no such biases");
  }
  load.keep_dtype(options.dtype);
  return layer;
}

// Embedding and head. Tied in the config: a head of the file's own that differs stays one, and a head alone serves as
// the embedding (transformers 5.17).
void load_ends(Loader& load, const TensorSource& source, const Family& family, DecoderSpec& s, ResidentWeights& w) {
  const std::string embedding_name = family.name(TensorRole::embedding), head_name = family.name(TensorRole::head);
  const std::vector<int64_t> shape{s.vocab_size, s.hidden_size};
  const bool embedding = source.contains(embedding_name), head = source.contains(head_name);
  if (!s.tie_word_embeddings || (embedding && head)) {
    w.embedding = load.take(embedding_name, shape);
    w.head = load.take(head_name, shape);
    if (!s.tie_word_embeddings || !load.clean()) return;
    if (!load.same(embedding_name, head_name)) {
      warn_once(source.dir().string() + ": tie_word_embeddings is true in config.json, but " + head_name +
                " differs from " + embedding_name + "; both are used, as transformers does");
      s.tie_word_embeddings = false;
      return;
    }
  } else {
    w.embedding = load.take(embedding || !head ? embedding_name : head_name, shape);
  }
  w.head = w.embedding;
}

// One tensor for all experts' gates and ups, another for their downs (transformers 5), or three for each expert.
bool holds_fused(const TensorSource& source, const Family& family, int64_t l) {
  return !source.contains(family.name(TensorRole::expert_gate, l)) &&
         source.contains(tensor_name(family.fused_gate_up, l));
}

// A layer's experts but [first, first + count) belong to the model, though they are not loaded here.
void use_experts(Loader& load, const TensorSource& source, const DecoderSpec& s, const Family& family, int64_t l,
                 int64_t first = 0, int64_t count = 0) {
  if (holds_fused(source, family, l)) {
    for (const auto* pattern : {&family.fused_gate_up, &family.fused_down}) load.use(tensor_name(*pattern, l));
    return;
  }
  for (int64_t e = 0; e < s.num_experts; ++e)
    if (e < first || e >= first + count)
      for_each_row(s, TensorScope::expert, s.layers[size_t(l)],
                   [&](const TensorRow& row) { load.use(tensor_name(row.name, l, e)); });
}

// Experts [first, first + count) of a layer.
ExpertWeights load_experts(Loader& load, const TensorSource& source, const DecoderSpec& s, const Family& family,
                           int64_t l, int64_t first, int64_t count) {
  const int64_t D = s.hidden_size, F = s.moe_intermediate_size, E = s.num_experts;
  ExpertWeights x;
  x.first = first;
  if (holds_fused(source, family, l)) {
    const at::Tensor gate_up = load.take(tensor_name(family.fused_gate_up, l), {E, 2 * F, D}, first, count),
                     down = load.take(tensor_name(family.fused_down, l), {E, D, F}, first, count);
    for (int64_t e = 0; e < count && load.clean(); ++e) {
      x.gate_FD.push_back(gate_up[e].narrow(0, 0, F));
      x.up_FD.push_back(gate_up[e].narrow(0, F, F));
      x.down_DF.push_back(down[e]);
    }
    return x;
  }
  use_experts(load, source, s, family, l, first, count);
  // A device sees a layer as one tensor: the layout of kernels/expert_layout.h.
  const at::Tensor gate_up = load.room({count, 2 * F, D}), down = load.room({count, D, F});
  const auto place = [&](TensorRole role, int64_t e) {
    if (!down.defined()) return at::Tensor();
    return role == TensorRole::expert_down ? down[e] : gate_up[e].narrow(0, role == TensorRole::expert_up ? F : 0, F);
  };
  for (int64_t e = 0; e < count; ++e)
    for_each_row(s, TensorScope::expert, s.layers[size_t(l)], [&](const TensorRow& row) {
      matrices(x, row.role)
          .push_back(load.take(tensor_name(row.name, l, first + e), row.shape(s), 0, 0, place(row.role, e)));
    });
  return x;
}

}  // namespace

bool packs_lean(const DecoderSpec& s) {
  constexpr int64_t kBothLayouts = int64_t{512}
                                   << 20;  // bytes of experts up to which the second layout is worth its memory
  int64_t sparse = 0;
  for (const auto& layer : s.layers) sparse += layer.sparse;
  return sparse * s.num_experts * 3 * s.moe_intermediate_size * s.hidden_size * 4 > kBothLayouts;
}

namespace {

// "org/name" that is no folder is most likely an id of the hub.
std::string what_a_path_may_be(const fs::path& dir) {
  const std::string text = (dir.is_absolute() ? dir.lexically_relative(fs::current_path()) : dir)
                               .string();  // a config's path has been made absolute
  const bool id = std::count(text.begin(), text.end(), '/') == 1 && text.front() != '/' && text.front() != '.' &&
                  text.back() != '/';
  return id ? "; if it is an id of the Hugging Face hub: hf download " + text + " --local-dir models/" +
                  dir.filename().string() + ", and name that folder"
            : "";
}

// The model of a folder of the hub's cache, models--ORG--NAME: the snapshot that refs/main names, else any.
fs::path newest_snapshot(const fs::path& cache) {
  if (fs::exists(cache / "refs" / "main"))
    if (const fs::path named = cache / "snapshots" / trim(io::read_file(cache / "refs" / "main"));
        fs::is_directory(named))
      return named;
  for (const auto& snapshot : fs::directory_iterator(cache / "snapshots")) return snapshot.path();
  return cache / "snapshots" / "HASH";
}

}  // namespace

DecoderSpec read_spec(const fs::path& dir) {
  MOEGRAFT_CHECK(fs::is_directory(dir), "model path ", dir.string(), " is not a directory", what_a_path_may_be(dir));
  MOEGRAFT_CHECK(fs::exists(dir / "config.json") || !fs::is_directory(dir / "snapshots"), dir.string(),
                 " is a folder of Hugging Face's cache; the model is ", newest_snapshot(dir).string());
  return read_spec_file(dir / "config.json");
}

DecoderSpec read_spec_file(const fs::path& file) {
  const io::Json config = io::read_json(file);
  MOEGRAFT_CHECK(config.is_object(), file.string(), ": expected a JSON object, got ", config.type_name());
  MOEGRAFT_CHECK(config.contains("model_type") && config.at("model_type").is_string(), file.string(),
                 ": model_type is missing");
  try {
    const Family& family = find_family(config.at("model_type").get<std::string>());
    io::Json filled = family.defaults;
    filled.update(config);
    DecoderSpec spec = family.parse(filled);
    check_spec(spec);
    return spec;
  } catch (const UserError& e) {
    const std::string text = e.what(), generic = "config.json";  // what families call the file
    fail<UserError>(file.string(), text.starts_with(generic) ? text.substr(generic.size()) : ": " + text);
  } catch (const io::Json::exception& e) { fail<UserError>(file.string(), ": ", e.what()); }
}

namespace {

// Once: users choose bf16 to be faster.
void say_if_slow(at::ScalarType dtype, at::Device device) {
  static std::once_flag once;
  if (dtype != at::kBFloat16 || !device.is_cpu()) return;
  std::call_once(once, [] {
    const kernels::CpuKernels k = kernels::cpu_kernels();
    if (k.bfloat16_speed == 0)
      log::warning("bfloat16 is slow on this CPU path (", k.path, "): ", k.bfloat16,
                   ", several times slower than float32; dtype float32 is the faster choice here");
    else if (k.bfloat16_speed < 1)
      log::info("bfloat16 on this CPU: ", k.bfloat16, "; about as fast as float32, at half of its base memory");
  });
}

}  // namespace

namespace {

// Who keeps the experts; null: the provider of everything else.
std::shared_ptr<ExpertRing> make_ring(const LoadOptions& options, std::shared_ptr<WeightProvider> rest) {
  if (options.keep_experts) return options.keep_experts(std::move(rest));
  if (options.experts != Experts::offloaded && options.experts != Experts::mapped) return nullptr;
  const bool lock = options.experts == Experts::offloaded && options.device.is_cuda();
  return std::make_shared<OffloadedWeights>(std::move(rest),
                                            lock ? std::optional<HostArena>(std::in_place) : std::nullopt);
}

void check_quantise(const LoadOptions& options) {
  if (!options.quantise) return;
  check_format(*options.quantise, options.device);
  MOEGRAFT_CHECK_USAGE(
      options.experts != Experts::offloaded && options.experts != Experts::mapped && !options.keep_experts,
      "model.quantize: ", kernels::format_row(*options.quantise).name,
      " keeps the experts where they compute; use model.offload: none and parallel.shard_base: false, or "
      "model.quantize: none");
}

}  // namespace

BaseModel load_base(const fs::path& dir, const LoadOptions& options) {
  say_if_slow(options.dtype, options.device);
  check_quantise(options);
  BaseModel base;
  base.path = dir;
  base.spec = read_spec(dir);
  const DecoderSpec& s = base.spec;
  const Family& family = find_family(s.family);
  const auto shared = std::make_shared<const TensorSource>(dir);
  const TensorSource& source = *shared;
  const int64_t count = options.num_experts > 0 ? options.num_experts : s.num_experts;
  MOEGRAFT_INVARIANT(options.first_expert >= 0 && options.first_expert + count <= s.num_experts, "load_base: experts ",
                     options.first_expert, "+", count, " of ", s.num_experts);
  MOEGRAFT_CHECK_USAGE(
      s.has_experts() ||
          (!options.keep_experts && options.experts != Experts::offloaded && options.experts != Experts::mapped),
      dir.string(), " is a dense model (", s.family,
      "): it has no experts to keep elsewhere; use model.offload: none and parallel.shard_base: false");
  Loader load(source, options, dir.string());
  auto w = std::make_shared<ResidentWeights>();
  w->type = options.dtype;
  w->where = options.device;
  const std::shared_ptr<ExpertRing> ring = make_ring(options, w);
  if (options.quantise) load.keep_dtype(std::nullopt);
  load_ends(load, source, family, base.spec, *w);
  load.keep_dtype(options.dtype);
  w->final_norm = load.take(family.name(TensorRole::final_norm), {s.hidden_size});
  for (int64_t l = 0; l < s.num_layers; ++l) {
    LayerWeights layer = load_layer(load, source, s, family, options, l);
    ExpertWeights experts;
    if (s.layers[l].sparse) {
      load.keep_on_cpu(ring != nullptr);
      if (options.quantise) load.keep_dtype(std::nullopt);
      if (options.experts == Experts::absent)
        use_experts(load, source, s, family, l);
      else
        experts = load_experts(load, source, s, family, l, options.first_expert, count);
      load.keep_on_cpu(false);
      load.keep_dtype(options.dtype);
    }
    w->layers.push_back(std::move(layer));
    if (ring && load.clean()) {
      ring->add_layer(experts);
      if (ring->copies())
        for (const auto* list : {&experts.gate_FD, &experts.up_FD, &experts.down_DF})
          for (const auto& t : *list) source.release(t);
      experts = {};
    }
    w->layer_experts.push_back(std::move(experts));
  }
  load.check_rest(s.num_layers);
  load.finish();
  finish_frozen(*w, packs_lean(base.spec), shared, options.quantise);
  if (ring)
    base.weights = ring;
  else
    base.weights = std::move(w);
  return base;
}

BaseModel init_base(const DecoderSpec& spec, const InitOptions& options) {
  check_spec(spec);
  const double std = spec.initializer_range,
               residual_std = std / std::sqrt(2.0 * double(spec.num_layers));  // GPT-2's scaling of residual branches
  uint64_t stream = 0;
  const auto make = [&](TensorInit init, const Shape& shape) {
    at::Tensor t = at::empty(shape, at::kFloat);
    if (init == TensorInit::ones || init == TensorInit::zeros)
      return t.fill_(init == TensorInit::ones ? 1.0 : 0.0).set_requires_grad(true);
    auto generator = at::make_generator<at::CPUGeneratorImpl>(Rng(options.seed, "model.init", stream++).derive_seed());
    return t
        .normal_(0.0,
                 init == TensorInit::embedding  ? options.embedding_std
                 : init == TensorInit::residual ? residual_std
                                                : std,
                 generator)
        .set_requires_grad(true);
  };
  const auto make_experts = [&] {
    ExpertWeights x;
    for_each_row(spec, TensorScope::expert, LayerSpec{}, [&](const TensorRow& row) {
      Shape shape = row.shape(spec);
      shape.insert(shape.begin(), spec.num_experts);
      at::Tensor& all = stacked(x, row.role) = make(row.init, shape);
      for (int64_t e = 0; e < spec.num_experts; ++e) matrices(x, row.role).push_back(all.detach()[e]);
    });
    return x;
  };
  BaseModel base;
  base.spec = spec;
  const auto make_tensor = [&](const TensorRow& row) {
    at::Tensor t = make(row.init, row.shape(spec));
    return row.role == TensorRole::router_correction ? t.set_requires_grad(false)
                                                     : t;  // it decides a choice, which has no gradient
  };
  auto w = make_weights(spec, make_tensor, make_experts);
  w->trains = true;
  base.weights = std::move(w);
  return base;
}

namespace {

// Calls visit(name, layer, tensor) for every tensor (layer: none of what is in none); stacked experts under names of
// their own when `stacked`, else one by one.
template <class Visit>
void for_each_tensor(const BaseModel& base, bool stacked, const Visit& visit) {
  const DecoderSpec& s = base.spec;
  WeightProvider& w = *base.weights;
  ResidentWeights ends;
  ends.embedding = w.embedding_VD(), ends.head = w.head_VD(), ends.final_norm = w.final_norm_D();
  for_each_row(s, TensorScope::model, {},
               [&](const TensorRow& row) { visit(row.name, std::optional<int64_t>(), slot(ends, row.role).get()); });
  for (int64_t l = 0; l < s.num_layers; ++l) {
    const LayerSpec& kind = s.layers[size_t(l)];
    LayerWeights layer = w.layer(l);
    for_each_row(s, TensorScope::layer, kind, [&](const TensorRow& row) {
      visit(tensor_name(row.name, l), std::optional(l), slot(layer, row.role).get());
    });
    if (!kind.sparse) continue;
    ExpertWeights x = w.experts(l, 0, s.num_experts);
    if (stacked) {
      const std::string prefix = "model.layers." + std::to_string(l) + ".mlp.experts.";
      visit(prefix + "gate_proj", std::optional(l), x.gate_EFD);
      visit(prefix + "up_proj", std::optional(l), x.up_EFD);
      visit(prefix + "down_proj", std::optional(l), x.down_EDF);
      continue;
    }
    for (int64_t e = 0; e < s.num_experts; ++e)
      for_each_row(s, TensorScope::expert, kind, [&](const TensorRow& row) {
        visit(tensor_name(row.name, l, e), std::optional(l), matrices(x, row.role)[size_t(e)]);
      });
  }
}

}  // namespace

BaseModel thaw_base(const BaseModel& frozen) {
  MOEGRAFT_INVARIANT(frozen.weights->dtype() == at::kFloat && frozen.weights->device().is_cpu(),
                     "thaw_base: the base must be float32 on the CPU");
  BaseModel base = init_base(frozen.spec, {});
  base.path = frozen.path;
  std::map<std::string, at::Tensor> leaves;  // of experts: views of the stacked ones
  for_each_tensor(base, false, [&](const std::string& name, std::optional<int64_t>, const at::Tensor& t) {
    leaves.emplace(name, t.detach());
  });
  for_each_tensor(frozen, false, [&](const std::string& name, std::optional<int64_t>, const at::Tensor& t) {
    leaves.at(name).copy_(t);
  });
  return base;
}

void register_base(BaseModel& base, ParameterRegistry& registry) {
  MOEGRAFT_INVARIANT(base.weights->trainable(), "register_base: the base is frozen");
  for_each_tensor(base, true, [&](const std::string& name, std::optional<int64_t> layer, const at::Tensor& t) {
    if (t.requires_grad())
      registry.add({.name = name, .tensor = t, .group = "base", .layer = layer, .provenance = "normal"});
  });
}

void save_base(const BaseModel& base, const fs::path& dir, at::ScalarType dtype, int64_t max_shard_bytes) {
  fs::create_directories(dir);
  std::vector<io::TensorMap> shards(1);
  int64_t shard_bytes = 0, total_bytes = 0, total_parameters = 0;
  for_each_tensor(base, false, [&](const std::string& name, std::optional<int64_t>, const at::Tensor& t) {
    const int64_t bytes = t.numel() * int64_t(c10::elementSize(dtype));
    if (shard_bytes + bytes > max_shard_bytes && !shards.back().empty()) shards.emplace_back(), shard_bytes = 0;
    shard_bytes += bytes;
    total_bytes += bytes;
    total_parameters += t.numel();
    shards.back()[name] = t.detach().to(at::kCPU, dtype).contiguous();
  });
  io::Json config = find_family(base.spec.family).write(base.spec);
  config["dtype"] = dtype == at::kFloat ? "float32" : dtype == at::kBFloat16 ? "bfloat16" : "float16";
  if (shards.size() == 1) {
    io::save_safetensors(dir / "model.safetensors", shards[0], {{"format", "pt"}});
  } else {
    io::Json map = io::Json::object();
    for (size_t i = 0; i < shards.size(); ++i) {
      char name[64];
      std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
      io::save_safetensors(dir / name, shards[i], {{"format", "pt"}});
      for (const auto& [key, tensor] : shards[i]) map[key] = name;
    }
    io::write_json(
        dir / "model.safetensors.index.json",
        {{"metadata", {{"total_size", total_bytes}, {"total_parameters", total_parameters}}}, {"weight_map", map}});
  }
  io::Json generation = {{"do_sample", true}};
  if (base.spec.bos_id >= 0) generation["bos_token_id"] = base.spec.bos_id;
  if (base.spec.eos_id >= 0) generation["eos_token_id"] = base.spec.eos_id;
  io::write_json(dir / "generation_config.json", generation);
  io::write_json(dir / "config.json", config);  // last: a directory without it is no model
}

}  // namespace moegraft::model
