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
#include "moegraft/model/offload.h"
#include "moegraft/model/random_base.h"
#include "moegraft/model/thaw.h"
#include "moegraft/kernels/cpu.h"
#include "resident_weights.h"

namespace moegraft::model {
namespace {

namespace fs = std::filesystem;

AttentionWeights load_attention(Loader& load, const TensorSource& source, const DecoderSpec& s, const std::string& prefix) {
  const int64_t D = s.hidden_size, q = s.num_heads * s.head_dim, kv = s.num_kv_heads * s.head_dim;
  AttentionWeights a;
  a.q = load.take(prefix + "q_proj.weight", {q, D});
  a.k = load.take(prefix + "k_proj.weight", {kv, D});
  a.v = load.take(prefix + "v_proj.weight", {kv, D});
  a.o = load.take(prefix + "o_proj.weight", {D, q});
  if (s.attention_bias) {
    a.q_bias = load.take(prefix + "q_proj.bias", {q});
    a.k_bias = load.take(prefix + "k_proj.bias", {kv});
    a.v_bias = load.take(prefix + "v_proj.bias", {kv});
    a.o_bias = load.take(prefix + "o_proj.bias", {D});
  } else if (source.contains(prefix + "q_proj.bias")) {
    load.problem(prefix + "q_proj.bias is present, but attention_bias is false in config.json");
  }
  if (s.qk_norm != QkNorm::none) {
    const bool full = s.qk_norm == QkNorm::full;
    a.q_norm = load.take(prefix + "q_norm.weight", {full ? q : s.head_dim});
    a.k_norm = load.take(prefix + "k_norm.weight", {full ? kv : s.head_dim});
  }
  return a;
}

// Embedding and head. Tied in the config: a head of the file's own that differs stays one, and a head alone serves as the embedding (transformers 5.17).
void load_ends(Loader& load, const TensorSource& source, const TensorNames& names, DecoderSpec& s, ResidentWeights& w) {
  const std::vector<int64_t> shape{s.vocab_size, s.hidden_size};
  const bool embedding = source.contains(names.embedding), head = source.contains(names.head);
  if (!s.tie_word_embeddings || (embedding && head)) {
    w.embedding = load.take(names.embedding, shape);
    w.head = load.take(names.head, shape);
    if (!s.tie_word_embeddings || !load.clean()) return;
    if (!load.same(names.embedding, names.head)) {
      warn_once(source.dir().string() + ": tie_word_embeddings is true in config.json, but " + names.head + " differs from " + names.embedding + "; both are used, as transformers does");
      s.tie_word_embeddings = false;
      return;
    }
  } else {
    w.embedding = load.take(embedding || !head ? names.embedding : names.head, shape);
  }
  w.head = w.embedding;
}

// One tensor for all experts' gates and ups, another for their downs (transformers 5), or three for each expert.
bool holds_fused(const TensorSource& source, const TensorNames& names, int64_t l) {
  return !source.contains(tensor_name(names.expert_gate, l, 0)) && source.contains(tensor_name(names.fused_gate_up, l));
}

// A layer's experts but [first, first + count) belong to the model, though they are not loaded here.
void use_experts(Loader& load, const TensorSource& source, const DecoderSpec& s, const TensorNames& names, int64_t l, int64_t first = 0, int64_t count = 0) {
  if (holds_fused(source, names, l))
    for (const auto* pattern : {&names.fused_gate_up, &names.fused_down}) load.use(tensor_name(*pattern, l));
  else
    for (int64_t e = 0; e < s.num_experts; ++e)
      if (e < first || e >= first + count)
        for (const auto* pattern : {&names.expert_gate, &names.expert_up, &names.expert_down}) load.use(tensor_name(*pattern, l, e));
}

// Experts [first, first + count) of a layer.
ExpertWeights load_experts(Loader& load, const TensorSource& source, const DecoderSpec& s, const TensorNames& names, int64_t l, int64_t first, int64_t count) {
  const int64_t D = s.hidden_size, F = s.moe_intermediate_size, E = s.num_experts;
  ExpertWeights x;
  x.first = first;
  if (holds_fused(source, names, l)) {
    const at::Tensor gate_up = load.take(tensor_name(names.fused_gate_up, l), {E, 2 * F, D}, first, count), down = load.take(tensor_name(names.fused_down, l), {E, D, F}, first, count);
    for (int64_t e = 0; e < count && load.clean(); ++e) {
      x.gate_FD.push_back(gate_up[e].narrow(0, 0, F));
      x.up_FD.push_back(gate_up[e].narrow(0, F, F));
      x.down_DF.push_back(down[e]);
    }
    return x;
  }
  use_experts(load, source, s, names, l, first, count);
  // A device sees a layer as one tensor: the layout of kernels/expert_layout.h.
  const at::Tensor gate_up = load.room({count, 2 * F, D}), down = load.room({count, D, F});
  const auto part = [](const at::Tensor& all, int64_t e, int64_t row, int64_t rows) { return all.defined() ? all[e].narrow(0, row, rows) : all; };
  for (int64_t e = 0; e < count; ++e) {
    x.gate_FD.push_back(load.take(tensor_name(names.expert_gate, l, first + e), {F, D}, 0, 0, part(gate_up, e, 0, F)));
    x.up_FD.push_back(load.take(tensor_name(names.expert_up, l, first + e), {F, D}, 0, 0, part(gate_up, e, F, F)));
    x.down_DF.push_back(load.take(tensor_name(names.expert_down, l, first + e), {D, F}, 0, 0, part(down, e, 0, D)));
  }
  return x;
}

}  // namespace

bool packs_lean(const DecoderSpec& s) {
  constexpr int64_t kBothLayouts = int64_t{512} << 20;  // bytes of experts up to which the second layout is worth its memory
  int64_t sparse = 0;
  for (const auto& layer : s.layers) sparse += layer.sparse;
  return sparse * s.num_experts * 3 * s.moe_intermediate_size * s.hidden_size * 4 > kBothLayouts;
}

namespace {

// "org/name" that is no folder is most likely an id of the hub.
std::string what_a_path_may_be(const fs::path& dir) {
  const std::string text = (dir.is_absolute() ? dir.lexically_relative(fs::current_path()) : dir).string();  // a config's path has been made absolute
  const bool id = std::count(text.begin(), text.end(), '/') == 1 && text.front() != '/' && text.front() != '.' && text.back() != '/';
  return id ? "; if it is an id of the Hugging Face hub: hf download " + text + " --local-dir models/" + dir.filename().string() + ", and name that folder" : "";
}

// The model of a folder of the hub's cache, models--ORG--NAME: the snapshot that refs/main names, else any.
fs::path newest_snapshot(const fs::path& cache) {
  if (fs::exists(cache / "refs" / "main"))
    if (const fs::path named = cache / "snapshots" / trim(io::read_file(cache / "refs" / "main")); fs::is_directory(named)) return named;
  for (const auto& snapshot : fs::directory_iterator(cache / "snapshots")) return snapshot.path();
  return cache / "snapshots" / "HASH";
}

}  // namespace

DecoderSpec read_spec(const fs::path& dir) {
  MOEGRAFT_CHECK(fs::is_directory(dir), "model path ", dir.string(), " is not a directory", what_a_path_may_be(dir));
  MOEGRAFT_CHECK(fs::exists(dir / "config.json") || !fs::is_directory(dir / "snapshots"), dir.string(), " is a folder of Hugging Face's cache; the model is ", newest_snapshot(dir).string());
  return read_spec_file(dir / "config.json");
}

DecoderSpec read_spec_file(const fs::path& file) {
  const io::Json config = io::read_json(file);
  MOEGRAFT_CHECK(config.is_object() && config.contains("model_type") && config.at("model_type").is_string(), file.string(), ": model_type is missing");
  try {
    const Family& family = find_family(config.at("model_type").get<std::string>());
    io::Json filled = family.defaults;
    filled.update(config);
    DecoderSpec spec = family.parse(filled);
    check_spec(spec);
    return spec;
  } catch (const UserError& e) {
    fail<UserError>((file.has_parent_path() ? file.parent_path() : fs::path(".")).string(), "/", e.what());
  } catch (const io::Json::exception& e) {
    fail<UserError>(file.string(), ": ", e.what());
  }
}

namespace {

// Once: users choose bf16 to be faster.
void say_if_slow(at::ScalarType dtype, at::Device device) {
  static std::once_flag once;
  if (dtype != at::kBFloat16 || !device.is_cpu()) return;
  std::call_once(once, [] {
    const kernels::CpuKernels k = kernels::cpu_kernels();
    if (k.bfloat16_speed == 0) log::warning("bfloat16 is slow on this CPU path (", k.path, "): ", k.bfloat16, ", several times slower than float32; dtype float32 is the faster choice here");
    else if (k.bfloat16_speed < 1) log::info("bfloat16 on this CPU: ", k.bfloat16, "; about as fast as float32, at half of its base memory");
  });
}

}  // namespace

namespace {

// Who keeps the experts; null: the provider of everything else.
std::shared_ptr<ExpertRing> make_ring(const LoadOptions& options, std::shared_ptr<WeightProvider> rest) {
  if (options.keep_experts) return options.keep_experts(std::move(rest));
  if (options.experts != Experts::offloaded && options.experts != Experts::mapped) return nullptr;
  const bool lock = options.experts == Experts::offloaded && options.device.is_cuda();
  return std::make_shared<OffloadedWeights>(std::move(rest), lock ? std::optional<HostArena>(std::in_place) : std::nullopt);
}

}  // namespace

BaseModel load_base(const fs::path& dir, const LoadOptions& options) {
  say_if_slow(options.dtype, options.device);
  BaseModel base;
  base.path = dir;
  base.spec = read_spec(dir);
  const DecoderSpec& s = base.spec;
  const TensorNames& names = find_family(s.family).names;
  const auto shared = std::make_shared<const TensorSource>(dir);
  const TensorSource& source = *shared;
  const int64_t count = options.num_experts > 0 ? options.num_experts : s.num_experts;
  MOEGRAFT_INVARIANT(options.first_expert >= 0 && options.first_expert + count <= s.num_experts, "load_base: experts ", options.first_expert, "+", count, " of ", s.num_experts);
  Loader load(source, options, dir.string());
  auto w = std::make_shared<ResidentWeights>();
  w->type = options.dtype;
  w->where = options.device;
  const std::shared_ptr<ExpertRing> ring = make_ring(options, w);
  load_ends(load, source, names, base.spec, *w);
  w->final_norm = load.take(names.final_norm, {s.hidden_size});
  for (int64_t l = 0; l < s.num_layers; ++l) {
    LayerWeights layer;
    layer.input_norm_D = load.take(tensor_name(names.input_norm, l), {s.hidden_size});
    layer.post_norm_D = load.take(tensor_name(names.post_norm, l), {s.hidden_size});
    layer.attention = load_attention(load, source, s, tensor_name(names.attention, l));
    ExpertWeights experts;
    if (s.layers[l].sparse) {
      layer.router_ED = load.take(tensor_name(names.router, l), {s.num_experts, s.hidden_size});
      load.keep_on_cpu(ring != nullptr);
      if (options.experts == Experts::absent) use_experts(load, source, s, names, l);
      else experts = load_experts(load, source, s, names, l, options.first_expert, count);
      load.keep_on_cpu(false);
    } else {
      const std::string prefix = tensor_name(names.dense, l);
      layer.dense.gate_ID = load.take(prefix + "gate_proj.weight", {s.intermediate_size, s.hidden_size});
      layer.dense.up_ID = load.take(prefix + "up_proj.weight", {s.intermediate_size, s.hidden_size});
      layer.dense.down_DI = load.take(prefix + "down_proj.weight", {s.hidden_size, s.intermediate_size});
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
  finish_frozen(*w, packs_lean(base.spec), shared);
  if (ring) base.weights = ring;
  else base.weights = std::move(w);
  return base;
}

BaseModel init_base(const DecoderSpec& spec, const InitOptions& options) {
  check_spec(spec);
  BaseModel base;
  base.spec = spec;
  auto w = std::make_shared<ResidentWeights>();
  w->trains = true;
  const int64_t D = spec.hidden_size, q = spec.num_heads * spec.head_dim, kv = spec.num_kv_heads * spec.head_dim, F = spec.moe_intermediate_size, E = spec.num_experts;
  uint64_t stream = 0;
  const auto normal = [&](at::IntArrayRef shape, double std) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(Rng(options.seed, "model.init", stream++).derive_seed());
    return at::empty(shape, at::kFloat).normal_(0.0, std, generator).set_requires_grad(true);
  };
  const auto ones = [](int64_t n) { return at::ones({n}, at::kFloat).set_requires_grad(true); };
  const auto zeros = [](int64_t n) { return at::zeros({n}, at::kFloat).set_requires_grad(true); };
  const double std = spec.initializer_range, residual_std = std / std::sqrt(2.0 * double(spec.num_layers));  // GPT-2's scaling of residual branches
  w->embedding = normal({spec.vocab_size, D}, options.embedding_std);
  w->head = spec.tie_word_embeddings ? w->embedding : normal({spec.vocab_size, D}, std);
  w->final_norm = ones(D);
  for (int64_t l = 0; l < spec.num_layers; ++l) {
    LayerWeights layer;
    layer.input_norm_D = ones(D);
    layer.post_norm_D = ones(D);
    auto& a = layer.attention;
    a.q = normal({q, D}, std);
    a.k = normal({kv, D}, std);
    a.v = normal({kv, D}, std);
    a.o = normal({D, q}, residual_std);
    if (spec.attention_bias) a.q_bias = zeros(q), a.k_bias = zeros(kv), a.v_bias = zeros(kv), a.o_bias = zeros(D);
    if (spec.qk_norm == QkNorm::per_head) a.q_norm = ones(spec.head_dim), a.k_norm = ones(spec.head_dim);
    if (spec.qk_norm == QkNorm::full) a.q_norm = ones(q), a.k_norm = ones(kv);
    ExpertWeights x;
    if (spec.layers[l].sparse) {
      layer.router_ED = normal({E, D}, std);
      x.gate_EFD = normal({E, F, D}, std);
      x.up_EFD = normal({E, F, D}, std);
      x.down_EDF = normal({E, D, F}, residual_std);
      for (int64_t e = 0; e < E; ++e) {
        x.gate_FD.push_back(x.gate_EFD.detach()[e]);
        x.up_FD.push_back(x.up_EFD.detach()[e]);
        x.down_DF.push_back(x.down_EDF.detach()[e]);
      }
    } else {
      layer.dense = {normal({spec.intermediate_size, D}, std), normal({spec.intermediate_size, D}, std), normal({D, spec.intermediate_size}, residual_std), {}, {}, {}};
    }
    w->layers.push_back(std::move(layer));
    w->layer_experts.push_back(std::move(x));
  }
  base.weights = std::move(w);
  return base;
}

namespace {

// Calls visit(name, tensor) for every tensor; stacked experts under their fused names when `stacked`, else one by one.
template <class Visit>
void for_each_tensor(const BaseModel& base, bool stacked, const Visit& visit) {
  const DecoderSpec& s = base.spec;
  const TensorNames& names = find_family(s.family).names;
  WeightProvider& w = *base.weights;
  const auto optional = [&](const std::string& name, const at::Tensor& t) {
    if (t.defined()) visit(name, t);
  };
  visit(names.embedding, w.embedding_VD());
  if (!s.tie_word_embeddings) visit(names.head, w.head_VD());
  visit(names.final_norm, w.final_norm_D());
  for (int64_t l = 0; l < s.num_layers; ++l) {
    const LayerWeights layer = w.layer(l);
    visit(tensor_name(names.input_norm, l), layer.input_norm_D);
    visit(tensor_name(names.post_norm, l), layer.post_norm_D);
    const std::string a = tensor_name(names.attention, l), d = tensor_name(names.dense, l);
    const AttentionWeights& at = layer.attention;
    visit(a + "q_proj.weight", at.q);
    visit(a + "k_proj.weight", at.k);
    visit(a + "v_proj.weight", at.v);
    visit(a + "o_proj.weight", at.o);
    optional(a + "q_proj.bias", at.q_bias);
    optional(a + "k_proj.bias", at.k_bias);
    optional(a + "v_proj.bias", at.v_bias);
    optional(a + "o_proj.bias", at.o_bias);
    optional(a + "q_norm.weight", at.q_norm);
    optional(a + "k_norm.weight", at.k_norm);
    if (!s.layers[l].sparse) {
      visit(d + "gate_proj.weight", layer.dense.gate_ID);
      visit(d + "up_proj.weight", layer.dense.up_ID);
      visit(d + "down_proj.weight", layer.dense.down_DI);
      continue;
    }
    visit(tensor_name(names.router, l), layer.router_ED);
    const ExpertWeights x = w.experts(l, 0, s.num_experts);
    if (stacked) {
      const std::string prefix = "model.layers." + std::to_string(l) + ".mlp.experts.";
      visit(prefix + "gate_proj", x.gate_EFD);
      visit(prefix + "up_proj", x.up_EFD);
      visit(prefix + "down_proj", x.down_EDF);
      continue;
    }
    for (int64_t e = 0; e < s.num_experts; ++e) {
      visit(tensor_name(names.expert_gate, l, e), x.gate_FD[e]);
      visit(tensor_name(names.expert_up, l, e), x.up_FD[e]);
      visit(tensor_name(names.expert_down, l, e), x.down_DF[e]);
    }
  }
}

}  // namespace

BaseModel thaw_base(const BaseModel& frozen) {
  MOEGRAFT_INVARIANT(frozen.weights->dtype() == at::kFloat && frozen.weights->device().is_cpu(), "thaw_base: the base must be float32 on the CPU");
  BaseModel base = init_base(frozen.spec, {});
  base.path = frozen.path;
  std::map<std::string, at::Tensor> leaves;  // of experts: views of the stacked ones
  for_each_tensor(base, false, [&](const std::string& name, const at::Tensor& t) { leaves.emplace(name, t.detach()); });
  for_each_tensor(frozen, false, [&](const std::string& name, const at::Tensor& t) { leaves.at(name).copy_(t); });
  return base;
}

void register_base(BaseModel& base, ParameterRegistry& registry) {
  MOEGRAFT_INVARIANT(base.weights->trainable(), "register_base: the base is frozen");
  for_each_tensor(base, true, [&](const std::string& name, const at::Tensor& t) { registry.add({name, t, "base", "", "replicated", "normal"}); });
}

void save_base(const BaseModel& base, const fs::path& dir, at::ScalarType dtype, int64_t max_shard_bytes) {
  fs::create_directories(dir);
  std::vector<io::TensorMap> shards(1);
  int64_t shard_bytes = 0, total_bytes = 0, total_parameters = 0;
  for_each_tensor(base, false, [&](const std::string& name, const at::Tensor& t) {
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
    io::write_json(dir / "model.safetensors.index.json", {{"metadata", {{"total_size", total_bytes}, {"total_parameters", total_parameters}}}, {"weight_map", map}});
  }
  io::Json generation = {{"do_sample", true}};
  if (base.spec.bos_id >= 0) generation["bos_token_id"] = base.spec.bos_id;
  if (base.spec.eos_id >= 0) generation["eos_token_id"] = base.spec.eos_id;
  io::write_json(dir / "generation_config.json", generation);
  io::write_json(dir / "config.json", config);  // last: a directory without it is no model
}

}  // namespace moegraft::model
