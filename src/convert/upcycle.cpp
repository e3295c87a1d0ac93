#include "moegraft/convert/upcycle.h"

#include "libtorch.h"

#include <numeric>
#include <set>
#include <span>

#include "calibrated.h"
#include "model_writer.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/base/text.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::convert {
namespace {

namespace fs = std::filesystem;
using Json = io::Json;

struct MethodName {
  UpcycleMethod method;
  const char* name;
};
constexpr MethodName kMethods[] = {{UpcycleMethod::virtual_groups, "virtual_groups"},
                                   {UpcycleMethod::clone, "clone"},
                                   {UpcycleMethod::split, "split"},
                                   {UpcycleMethod::cluster, "cluster"}};

struct RouterName {
  UpcycleRouter router;
  const char* name;
};
constexpr RouterName kRouters[] = {
    {UpcycleRouter::random, "random"}, {UpcycleRouter::kmeans, "kmeans"}, {UpcycleRouter::analytic, "analytic"}};

template <class Row>
const Row& find_name(std::span<const Row> table, const std::string& name, const char* option) {
  std::vector<std::string> known;
  for (const auto& row : table) {
    if (name == row.name) return row;
    known.emplace_back(row.name);
  }
  fail<UsageError>(option, " must be one of ", join(known, ", "), ", got ", name);
}

UpcycleRouter router_of(const UpcycleOptions& o) {
  return o.router.value_or(o.method == UpcycleMethod::cluster ? UpcycleRouter::analytic : UpcycleRouter::random);
}

// Which mixture has a dense model's attention, and what it calls its parts.
struct Layout {
  const char *dense, *model_type, *class_name, *moe, *gate, *up, *down, *experts_key, *width_key;
};
constexpr Layout kLayouts[] = {
    {"llama", "mixtral", "MixtralForCausalLM", "block_sparse_moe", "w1", "w3", "w2", "num_local_experts",
     "intermediate_size"},
    {"mistral", "mixtral", "MixtralForCausalLM", "block_sparse_moe", "w1", "w3", "w2", "num_local_experts",
     "intermediate_size"},
    {"qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", "mlp", "gate_proj", "up_proj", "down_proj", "num_experts",
     "moe_intermediate_size"},
};

const Layout& find_layout(const std::string& model_type, const std::string& where) {
  std::set<std::string> dense;
  for (const auto& layout : kLayouts) {
    if (model_type == layout.dense) return layout;
    MOEGRAFT_CHECK(model_type != layout.model_type, where, ": ", model_type,
                   " is a mixture of experts already; upcycling starts from a dense model");
    dense.insert(layout.dense);
  }
  fail(where, ": model_type \"", model_type,
       "\" cannot be upcycled; known: ", join({dense.begin(), dense.end()}, ", "));
}

// The tensors of a directory's safetensors files by name, mapped.
class Tensors {
 public:
  explicit Tensors(const fs::path& dir) : dir_(dir) {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(dir))
      if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end());
    MOEGRAFT_CHECK(!paths.empty(), dir.string(), " holds no *.safetensors");
    for (const auto& path : paths) {
      files_.emplace_back(path);
      for (const auto& name : files_.back().names())
        MOEGRAFT_CHECK(where_.emplace(name, files_.size() - 1).second, path.string(), ": ", name,
                       " is in another file of the folder too");
    }
  }
  bool contains(const std::string& name) const { return where_.contains(name); }
  const std::map<std::string, size_t>& names() const { return where_; }
  at::Tensor get(const std::string& name) const {
    const auto found = where_.find(name);
    MOEGRAFT_CHECK(found != where_.end(), dir_.string(), ": the tensor ", name, " is missing");
    return files_[found->second].tensor(name);
  }
  std::vector<int64_t> shape(const std::string& name) const { return files_[where_.at(name)].shape(name); }

 private:
  fs::path dir_;
  std::vector<io::SafetensorsFile> files_;
  std::map<std::string, size_t> where_;
};

// What becomes of a layer's FFN of N neurons: each expert holds `width` of them, of which every expert holds the
// `shared` first.
struct Cut {
  int64_t experts, top_k, width;
  double down_scale;  // of the own neurons
  bool keeps;
  int64_t shared = 0;
};

constexpr int64_t kMostExperts = 4096;  // far above any model

Cut make_cut(const UpcycleOptions& o, int64_t N) {
  const auto divides = [&](int64_t parts, const char* option) {
    MOEGRAFT_CHECK_USAGE(parts > 0 && N % parts == 0, option, " must divide the FFN's ", N, " neurons, got ", parts);
  };
  if (o.method == UpcycleMethod::virtual_groups) {
    divides(o.shards, "--shards");
    MOEGRAFT_CHECK_USAGE(o.clones > 0 && o.clones <= kMostExperts / o.shards,
                         "--clones must be at least 1 and make at most ", kMostExperts, " experts with --shards ",
                         o.shards, ", got ", o.clones);
    return {o.shards * o.clones, o.shards, N / o.shards, double(o.shards), true};
  }
  MOEGRAFT_CHECK_USAGE(o.experts <= kMostExperts, "--experts must be at most ", kMostExperts, ", got ", o.experts);
  MOEGRAFT_CHECK_USAGE(o.experts > 0 && o.top_k > 0 && o.top_k <= o.experts, "--top-k must be in [1, --experts], got ",
                       o.top_k, " of ", o.experts);
  if (o.method == UpcycleMethod::cluster) {
    MOEGRAFT_CHECK_USAGE(o.shared >= 0 && o.shared < 1, "--shared must be in [0, 1), got ", o.shared);
    const int64_t own = int64_t(double(N) * (1 - o.shared)) / o.experts, shared = N - own * o.experts;
    MOEGRAFT_CHECK_USAGE(own > 0, "--experts ", o.experts, " leave no neuron for each of the FFN's ", N,
                         ", of which --shared takes ", o.shared);
    return {o.experts, o.top_k, shared + own, double(o.top_k), false, shared};
  }
  if (o.method == UpcycleMethod::clone) return {o.experts, o.top_k, N, 1, o.noise == 0 && o.redraw == 0};
  divides(o.experts, "--experts");
  // Weights sum to one: the mean over the active experts times `experts` estimates the sum over all.
  return {o.experts, o.top_k, N / o.experts, double(o.experts), false};
}

// Makes the tensors of the mixture; outlives the list of them.
class Upcycling {
 public:
  Upcycling(const Tensors& in, const Layout& layout, const UpcycleOptions& o, const Cut& cut, int64_t D, int64_t N,
            std::vector<at::Tensor> inputs)
      : in_(in), layout_(layout), o_(o), cut_(cut), D_(D), N_(N), inputs_(std::move(inputs)) {}

  std::vector<ModelTensor> tensors(int64_t layers) const {
    std::vector<ModelTensor> out;
    for (const auto& [name, file] : in_.names())
      if (name.find(".mlp.") == std::string::npos)
        out.push_back({name, in_.shape(name), [this, name = name] { return in_.get(name); }});
    for (int64_t l = 0; l < layers; ++l) add_layer(l, out);
    return out;
  }

 private:
  uint64_t derive_seed(const char* purpose, int64_t l) const {
    return Rng(o_.seed, purpose, uint64_t(l)).derive_seed();
  }
  at::Generator generator(const char* purpose, int64_t l) const {
    return at::make_generator<at::CPUGeneratorImpl>(derive_seed(purpose, l));
  }

  static std::string dense_name(int64_t l, int site) {
    return "model.layers." + std::to_string(l) + ".mlp." +
           (site == 0   ? "gate_proj"
            : site == 1 ? "up_proj"
                        : "down_proj") +
           ".weight";
  }
  at::Tensor dense(int64_t l, int site) const { return in_.get(dense_name(l, site)); }

  // The neurons of each shard: a random deal, sorted within a shard so that reading stays in order.
  at::Tensor shard(int64_t l, int64_t s) const {
    const int64_t width = cut_.width;
    if (o_.contiguous || width == N_) return at::arange(s * width, (s + 1) * width, at::kLong);
    return std::get<0>(at::randperm(N_, generator("upcycle.deal", l), at::TensorOptions(at::kLong))
                           .narrow(0, s * width, width)
                           .sort());
  }
  // Of one layer at a time, the one that is being written.
  const NeuronGroups& groups(int64_t l) const {
    if (l != grouped_)
      groups_ = group_neurons({inputs_[size_t(l)], dense(l, 0), dense(l, 1), dense(l, 2)}, cut_.experts, cut_.shared,
                              derive_seed("upcycle.cluster", l)),
      grouped_ = l;
    return groups_;
  }
  at::Tensor neurons(int64_t l, int64_t e) const {
    return o_.method == UpcycleMethod::cluster ? at::cat({groups(l).shared_S, groups(l).own_EO[e]})
                                               : shard(l, shard_of(e));
  }
  int64_t shard_of(int64_t e) const {
    return o_.method == UpcycleMethod::clone ? 0 : o_.method == UpcycleMethod::split ? e : e % o_.shards;
  }

  at::Tensor router(int64_t l) const {
    const int64_t shared = o_.method == UpcycleMethod::virtual_groups ? o_.shards : 1,
                  rows = cut_.experts / shared;  // experts with one row
    const auto make = [&] {
      switch (router_of(o_)) {
        case UpcycleRouter::kmeans:
          return kmeans_router(inputs_[size_t(l)], rows, o_.router_std, derive_seed("upcycle.kmeans", l));
        case UpcycleRouter::analytic: return analytic_router(inputs_[size_t(l)], groups(l).strength_TE);
        default:
          return at::normal(0.0, o_.router_std, {rows, D_}, generator("upcycle.router", l),
                            at::TensorOptions(at::kFloat));
      }
    };
    return make().repeat_interleave(shared, 0);
  }

  // An expert's copy of a dense matrix. Neurons are rows of gate and up, columns of down.
  at::Tensor expert(int64_t l, int64_t e, int site) const {
    const int64_t axis = site == 2 ? 1 : 0;
    at::Tensor w = dense(l, site);
    if (cut_.width != N_) w = w.index_select(axis, neurons(l, e));
    if (site == 2 && cut_.down_scale != 1) {
      w = w.to(at::kFloat).clone();
      w.narrow(1, cut_.shared, cut_.width - cut_.shared).mul_(cut_.down_scale);
    }
    if (o_.method != UpcycleMethod::clone || cut_.keeps) return w;
    w = w.to(at::kFloat).clone();
    const double std = w.std().item<double>(), mean = w.mean().item<double>();
    const int64_t stream = (l * cut_.experts + e) * 3 + site;
    if (o_.noise > 0) w += at::normal(0.0, o_.noise * std, w.sizes(), generator("upcycle.noise", stream), w.options());
    if (o_.redraw > 0) {  // the same neurons in gate, up and down
      const at::Tensor neurons =
          at::randperm(N_, generator("upcycle.redraw", l * cut_.experts + e), at::TensorOptions(at::kLong))
              .narrow(0, 0, std::lround(o_.redraw * double(N_)));
      at::Tensor fresh = at::normal(mean, std, w.sizes(), generator("upcycle.fresh", stream), w.options());
      w.index_copy_(axis, neurons, fresh.index_select(axis, neurons));
    }
    return w;
  }

  void add_layer(int64_t l, std::vector<ModelTensor>& out) const {
    const std::string moe = "model.layers." + std::to_string(l) + "." + layout_.moe + ".";
    out.push_back({moe + "gate.weight", {cut_.experts, D_}, [this, l] { return router(l); }});
    const char* to[] = {layout_.gate, layout_.up, layout_.down};
    for (int site = 0; site < 3; ++site) {
      const auto shape = [&](int64_t neurons) {
        return site == 2 ? std::vector<int64_t>{D_, neurons} : std::vector<int64_t>{neurons, D_};
      };
      const std::string name = dense_name(l, site);
      MOEGRAFT_CHECK(in_.contains(name) && in_.shape(name) == shape(N_), name, " must be there with shape ", shape(N_));
      for (int64_t e = 0; e < cut_.experts; ++e)
        out.push_back({moe + "experts." + std::to_string(e) + "." + to[site] + ".weight", shape(cut_.width),
                       [this, l, e, site] { return expert(l, e, site); }});
    }
  }

  const Tensors& in_;
  const Layout& layout_;
  const UpcycleOptions& o_;
  Cut cut_;
  int64_t D_, N_;
  std::vector<at::Tensor> inputs_;
  mutable int64_t grouped_ = -1;
  mutable NeuronGroups groups_;
};

void check_router(const UpcycleOptions& o) {
  MOEGRAFT_CHECK_USAGE(router_of(o) != UpcycleRouter::analytic || o.method == UpcycleMethod::cluster,
                       "--router analytic needs --method cluster, whose neurons it is made from");
  MOEGRAFT_CHECK_USAGE(
      !needs_inputs(o) || o.inputs,
      "--method cluster and --router kmeans look at what a text does in the dense model: give --text FILE");
}

std::vector<at::Tensor> ask_for_inputs(const UpcycleOptions& o, int64_t layers, int64_t D) {
  if (!needs_inputs(o)) return {};
  const int64_t rows = o.method == UpcycleMethod::virtual_groups ? o.clones : o.experts;
  std::vector<at::Tensor> inputs = o.inputs();
  MOEGRAFT_CHECK(int64_t(inputs.size()) == layers, "calibration: inputs of ", layers, " layers are needed, got ",
                 inputs.size());
  for (const at::Tensor& x : inputs)
    MOEGRAFT_CHECK(x.dim() == 2 && x.size(1) == D && x.size(0) >= rows && x.scalar_type() == at::kFloat,
                   "calibration: inputs of a layer must be float32 [tokens, ", D, "] with at least ", rows,
                   " tokens, got ", x.sizes().vec());
  return inputs;
}

int64_t size_of(const Json& config, const char* key, const std::string& where) {
  MOEGRAFT_CHECK(config.contains(key) && config[key].is_number_integer() && config[key].get<int64_t>() > 0, where, ": ",
                 key, " must be a positive integer");
  return config[key].get<int64_t>();
}

bool is_set(const Json& config, const char* key) {
  return config.contains(key) && !config[key].is_null() && config[key] != false;
}

Json moe_config(Json c, const Layout& layout, const Cut& cut, const std::string& where) {
  const std::string type = layout.model_type;
  MOEGRAFT_CHECK(!is_set(c, "mlp_bias") && !(type == "mixtral" && is_set(c, "attention_bias")), where, ": ", type,
                 " has no place for biases");
  MOEGRAFT_CHECK(!is_set(c, "use_sliding_window"), where, ": use_sliding_window is not carried over");
  for (const char* key : {"mlp_bias", "attention_bias", "pretraining_tp", "rope_interleaved", "is_llama_config",
                          "transformers.js_config", "max_window_layers", "layer_types"})
    if (type == "mixtral" || std::string(key) != "attention_bias") c.erase(key);
  c["model_type"] = type;
  c["architectures"] = {layout.class_name};
  c[layout.experts_key] = cut.experts;
  c["num_experts_per_tok"] = cut.top_k;
  c[layout.width_key] = cut.width;
  if (type == "mixtral" && !c.contains("sliding_window")) c["sliding_window"] = nullptr;
  if (type == "qwen3_moe")
    c["norm_topk_prob"] = true, c["decoder_sparse_step"] = 1, c["mlp_only_layers"] = Json::array();
  return c;
}

}  // namespace

UpcycleMethod parse_upcycle_method(const std::string& name) {
  return find_name<MethodName>(kMethods, name, "--method").method;
}
UpcycleRouter parse_upcycle_router(const std::string& name) {
  return find_name<RouterName>(kRouters, name, "--router").router;
}
bool needs_inputs(const UpcycleOptions& o) {
  return o.method == UpcycleMethod::cluster || router_of(o) == UpcycleRouter::kmeans;
}

UpcycleReport upcycle(const fs::path& dense, const fs::path& dir, const UpcycleOptions& o) {
  const std::string where = (dense / "config.json").string();
  const Json config = io::read_json(dense / "config.json");
  MOEGRAFT_CHECK(config.is_object() && config.contains("model_type") && config["model_type"].is_string(), where,
                 ": model_type is missing");
  MOEGRAFT_CHECK_USAGE(o.noise >= 0 && o.redraw >= 0 && o.redraw <= 1,
                       "--noise must not be negative and --redraw lie in [0, 1], got ", o.noise, " and ", o.redraw);
  const Layout& layout = find_layout(config["model_type"], where);
  const int64_t layers = size_of(config, "num_hidden_layers", where), D = size_of(config, "hidden_size", where),
                N = size_of(config, "intermediate_size", where);
  MOEGRAFT_CHECK(config.value("hidden_act", "silu") == "silu", where, ": hidden_act must be silu, got ",
                 config.value("hidden_act", ""));
  const Cut cut = make_cut(o, N);
  check_router(o);
  const Json target = moe_config(config, layout, cut, where);
  const Tensors in(dense);
  const at::Tensor embedding_VD = in.get("model.embed_tokens.weight");
  const std::vector<int64_t> rows{size_of(config, "vocab_size", where), D};
  MOEGRAFT_CHECK(embedding_VD.sizes() == rows, where, ": vocab_size and hidden_size say ", rows,
                 ", model.embed_tokens.weight is ", embedding_VD.sizes().vec());
  const at::ScalarType dtype = embedding_VD.scalar_type();
  ModelDirectory out(dir);
  const Upcycling upcycling(in, layout, o, cut, D, N, ask_for_inputs(o, layers, D));
  const auto tensors = upcycling.tensors(layers);
  out.write_weights(tensors, {dtype, o.max_shard_bytes});
  for (const char* name :
       {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt"})
    if (fs::exists(dense / name)) out.copy(dense / name);
  out.write_json("config.json", target);
  out.publish();

  UpcycleReport r{layout.dense, layout.model_type, cut.experts, cut.top_k, cut.width, 0, 0, cut.keeps};
  const auto elements = [](const std::vector<int64_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  };
  for (const auto& t : tensors) r.parameters += elements(t.shape);
  for (const auto& [name, file] : in.names()) r.dense_parameters += elements(in.shape(name));
  return r;
}

}  // namespace moegraft::convert
