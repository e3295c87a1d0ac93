#include "moegraft/convert/import_gguf.h"

#include "libtorch.h"

#include <cmath>
#include <cstdio>
#include <optional>
#include <set>

#include "gguf_tokenizer.h"
#include "model_writer.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/base/log.h"
#include "moegraft/convert/gguf.h"
#include "moegraft/tokenizer/tokenizer.h"

namespace moegraft::convert {
namespace {

using Json = io::Json;

// One architecture of GGUF, dense or with experts, and the model type that it becomes.
struct Architecture {
  const char* gguf;
  bool experts;
  const char *model_type, *class_name;
  bool neighbours;  // rotary pairs lie side by side, where Hugging Face pairs halves of a head
  const char* moe;  // prefix of router and experts within a layer
  const char *expert_gate, *expert_up, *expert_down;
};
constexpr Architecture kArchitectures[] = {
    {"llama", false, "llama", "LlamaForCausalLM", true, "", "", "", ""},
    {"llama", true, "mixtral", "MixtralForCausalLM", true, "block_sparse_moe", "w1", "w3", "w2"},
    {"qwen3", false, "qwen3", "Qwen3ForCausalLM", false, "", "", "", ""},
    {"qwen3moe", true, "qwen3_moe", "Qwen3MoeForCausalLM", false, "mlp", "gate_proj", "up_proj", "down_proj"},
    {"olmoe", true, "olmoe", "OlmoeForCausalLM", false, "mlp", "gate_proj", "up_proj", "down_proj"},
};

const Architecture& find_architecture(const GgufFile& file) {
  const std::string name = file.string("general.architecture");
  const bool experts = file.integer(name + ".expert_count", 0) > 0;
  std::set<std::string> known;
  for (const auto& a : kArchitectures) {
    if (name == a.gguf && experts == a.experts) return a;
    known.insert(std::string(a.gguf) + (a.experts ? " with experts" : ""));
  }
  fail(file.path().string(), ": architecture \"", name, "\"", experts ? " with experts" : "",
       " cannot be imported; known: ", join({known.begin(), known.end()}, ", "));
}

struct Sizes {
  int64_t layers, D, H, G, C, I, F, E, K, V, positions;
};

Sizes read_sizes(const GgufFile& file, const Architecture& a) {
  const std::string p = std::string(a.gguf) + ".", where = file.path().string() + ": ";
  Sizes s{};
  s.layers = file.integer(p + "block_count"), s.D = file.integer(p + "embedding_length"),
  s.I = file.integer(p + "feed_forward_length", 0);
  s.H = file.integer(p + "attention.head_count"), s.G = file.integer(p + "attention.head_count_kv", s.H);
  s.positions = file.integer(p + "context_length");
  MOEGRAFT_CHECK(s.layers > 0 && s.layers <= 100000 && s.D > 0 && s.H > 0 && s.G > 0 && s.H % s.G == 0, where,
                 "impossible sizes: ", s.layers, " layers, width ", s.D, ", ", s.H, " heads, ", s.G, " key heads");
  s.C = file.integer(p + "attention.key_length", s.D / s.H);
  MOEGRAFT_CHECK(file.integer(p + "attention.value_length", s.C) == s.C, where,
                 "values as wide as keys are expected, got ", p, "attention.value_length ",
                 file.integer(p + "attention.value_length", s.C));
  MOEGRAFT_CHECK(file.integer(p + "rope.dimension_count", s.C) == s.C, where,
                 "rotary embedding of a part of the head (", file.integer(p + "rope.dimension_count", s.C), " of ", s.C,
                 ") is not supported");
  MOEGRAFT_CHECK(!file.contains("rope_freqs.weight"), where,
                 "rope_freqs.weight: scaled rotary frequencies (Llama 3.1 and later) do not say which scaling made "
                 "them; use the Hugging Face checkpoint");
  if (a.experts) {
    s.E = file.integer(p + "expert_count"), s.K = file.integer(p + "expert_used_count");
    s.F = file.integer(p + "expert_feed_forward_length", s.I);
    MOEGRAFT_CHECK(file.integer(p + "expert_shared_count", 0) == 0, where, "shared experts are not supported");
  }
  const auto embedding = file.shape("token_embd.weight");
  MOEGRAFT_CHECK(embedding.size() == 2 && embedding[1] == s.D, where, "token_embd.weight must have ", s.D, " columns");
  s.V = embedding[0];
  return s;
}

// float32 0.000001 came from a decimal number: the shortest one that gives it.
double shortest(double value) {
  char text[32];
  for (int digits = 1; digits <= 9; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (float(std::strtod(text, nullptr)) == float(value)) break;
  }
  return std::strtod(text, nullptr);
}

Json make_config(const GgufFile& file, const Architecture& a, const Sizes& s, bool tied, at::ScalarType dtype) {
  const std::string p = std::string(a.gguf) + ".", where = file.path().string() + ": ";
  Json rope{{"rope_theta", shortest(file.number(p + "rope.freq_base", 10000.0))}, {"rope_type", "default"}};
  const std::string scaling = file.string(p + "rope.scaling.type", "none");
  MOEGRAFT_CHECK(scaling == "none" || scaling == "linear" || scaling == "yarn", where, "rope scaling \"", scaling,
                 "\" is not supported; known: none, linear, yarn");
  if (scaling != "none") {
    rope["rope_type"] = scaling;
    rope["factor"] = shortest(file.number(p + "rope.scaling.factor"));
    if (scaling == "yarn")
      rope["original_max_position_embeddings"] = file.integer(p + "rope.scaling.original_context_length", s.positions);
  }
  const auto id = [&](const char* key) { return file.has(key) ? Json(file.integer(key)) : Json(nullptr); };
  Json c{{"model_type", a.model_type},
         {"architectures", {a.class_name}},
         {"vocab_size", s.V},
         {"hidden_size", s.D},
         {"intermediate_size", s.I},
         {"num_hidden_layers", s.layers},
         {"num_attention_heads", s.H},
         {"num_key_value_heads", s.G},
         {"head_dim", s.C},
         {"hidden_act", "silu"},
         {"max_position_embeddings", s.positions},
         {"rms_norm_eps", shortest(file.number(p + "attention.layer_norm_rms_epsilon"))},
         {"rope_parameters", rope},
         {"rope_theta", rope["rope_theta"]},
         {"tie_word_embeddings", tied},
         {"attention_bias", false},
         {"dtype", dtype_name(dtype)},
         {"bos_token_id", id("tokenizer.ggml.bos_token_id")},
         {"eos_token_id", id("tokenizer.ggml.eos_token_id")},
         {"pad_token_id", id("tokenizer.ggml.padding_token_id")}};
  const int64_t window = file.integer(p + "attention.sliding_window", 0);
  const std::string type = a.model_type;
  if (type == "mixtral")
    c["num_local_experts"] = s.E, c["num_experts_per_tok"] = s.K, c["intermediate_size"] = s.F,
    c["sliding_window"] = window > 0 ? Json(window) : Json(nullptr);
  if (type == "olmoe") {
    c["num_experts"] = s.E, c["num_experts_per_tok"] = s.K, c["intermediate_size"] = s.F, c["norm_topk_prob"] = false;
    c["clip_qkv"] = file.has(p + "attention.clamp_kqv") ? Json(file.number(p + "attention.clamp_kqv")) : Json(nullptr);
  }
  if (type == "qwen3_moe") {
    c["num_experts"] = s.E, c["num_experts_per_tok"] = s.K, c["moe_intermediate_size"] = s.F,
    c["norm_topk_prob"] = true;
    c["decoder_sparse_step"] = 1, c["mlp_only_layers"] = Json::array();
  }
  MOEGRAFT_CHECK(window == 0 || type == "mixtral" || type == "llama", where, p,
                 "attention.sliding_window is not supported with ", type);
  if (type == "llama" && window > 0)
    c["model_type"] = "mistral", c["architectures"] = {"MistralForCausalLM"}, c["sliding_window"] = window;
  return c;
}

// ggml's rows of a head go (0, C/2, 1, C/2 + 1, …) in Hugging Face's counting.
at::Tensor undo_neighbours(const at::Tensor& w, int64_t heads) {
  return w.view({heads, w.size(0) / heads / 2, 2, -1}).transpose(1, 2).reshape(w.sizes());
}

// Reads a tensor once for all its slices.
class StackedReader {
 public:
  explicit StackedReader(const GgufFile& file) : file_(file) {}
  at::Tensor slice(const std::string& name, int64_t e) {
    if (name != name_) tensor_ = file_.read(name), name_ = name;
    return tensor_[e];
  }

 private:
  const GgufFile& file_;
  std::string name_;
  at::Tensor tensor_;
};

// What the target holds, in order, and from which tensors of the file.
class Plan {
 public:
  Plan(const GgufFile& file, const Architecture& a, const Sizes& s)
      : file_(file), a_(a), s_(s), stacked_(std::make_shared<StackedReader>(file)) {
    add("model.embed_tokens.weight", "token_embd.weight", {s.V, s.D});
    if (file.contains("output.weight")) add("lm_head.weight", "output.weight", {s.V, s.D});
    add("model.norm.weight", "output_norm.weight", {s.D});
    for (int64_t l = 0; l < s.layers; ++l) layer(l);
    std::vector<std::string> unused;
    for (const auto& name : file.names())
      if (!used_.contains(name)) unused.push_back(name);
    MOEGRAFT_CHECK(unused.empty(), file.path().string(), ": ", unused.size(), " tensor(s) have no place in ",
                   a.model_type, ", the first is ", unused.front());
  }
  std::vector<ModelTensor> take() { return std::move(tensors_); }

 private:
  void add(const std::string& name, const std::string& from, const std::vector<int64_t>& shape, int64_t heads = 0) {
    MOEGRAFT_CHECK(file_.contains(from), file_.path().string(), ": the tensor ", from, " is missing");
    MOEGRAFT_CHECK(file_.shape(from) == shape, file_.path().string(), ": ", from, " must have shape ", shape, ", got ",
                   file_.shape(from));
    file_.type(from);
    used_.insert(from);
    tensors_.push_back({name, shape, [this_file = &file_, from, heads] {
                          const at::Tensor w = this_file->read(from);
                          return heads ? undo_neighbours(w, heads) : w;
                        }});
  }
  void expert(const std::string& name, const std::string& layer, const char* site, int64_t e,
              const std::vector<int64_t>& shape) {
    const std::string stacked = layer + site + "_exps.weight",
                      own = layer + site + "." + std::to_string(e) +
                            ".weight";  // Mixtral files of 2023 hold one tensor per expert
    if (!file_.contains(stacked)) return add(name, own, shape);
    const std::vector<int64_t> all{s_.E, shape[0], shape[1]};
    MOEGRAFT_CHECK(file_.shape(stacked) == all, file_.path().string(), ": ", stacked, " must have shape ", all,
                   ", got ", file_.shape(stacked));
    file_.type(stacked);
    used_.insert(stacked);
    tensors_.push_back({name, shape, [reader = stacked_, stacked, e] { return reader->slice(stacked, e); }});
  }
  void layer(int64_t l) {
    const std::string to = "model.layers." + std::to_string(l) + ".", from = "blk." + std::to_string(l) + ".";
    const int64_t q = s_.H * s_.C, kv = s_.G * s_.C;
    const bool turned = a_.neighbours;
    add(to + "input_layernorm.weight", from + "attn_norm.weight", {s_.D});
    add(to + "self_attn.q_proj.weight", from + "attn_q.weight", {q, s_.D}, turned ? s_.H : 0);
    add(to + "self_attn.k_proj.weight", from + "attn_k.weight", {kv, s_.D}, turned ? s_.G : 0);
    add(to + "self_attn.v_proj.weight", from + "attn_v.weight", {kv, s_.D});
    add(to + "self_attn.o_proj.weight", from + "attn_output.weight", {s_.D, q});
    const std::string type = a_.model_type;
    if (type == "qwen3" || type == "qwen3_moe" || type == "olmoe") {
      const bool full = type == "olmoe";  // OLMoE norms all heads together
      add(to + "self_attn.q_norm.weight", from + "attn_q_norm.weight", {full ? q : s_.C});
      add(to + "self_attn.k_norm.weight", from + "attn_k_norm.weight", {full ? kv : s_.C});
    }
    add(to + "post_attention_layernorm.weight", from + "ffn_norm.weight", {s_.D});
    if (!a_.experts) {
      add(to + "mlp.gate_proj.weight", from + "ffn_gate.weight", {s_.I, s_.D});
      add(to + "mlp.up_proj.weight", from + "ffn_up.weight", {s_.I, s_.D});
      add(to + "mlp.down_proj.weight", from + "ffn_down.weight", {s_.D, s_.I});
      return;
    }
    const std::string moe = to + a_.moe + ".";
    add(moe + "gate.weight", from + "ffn_gate_inp.weight", {s_.E, s_.D});
    struct Part {
      const char *name, *site;
      std::vector<int64_t> shape;
    };
    // Site by site, so that a stacked tensor is read once.
    for (const Part& part : {Part{a_.expert_gate, "ffn_gate", {s_.F, s_.D}}, Part{a_.expert_up, "ffn_up", {s_.F, s_.D}},
                             Part{a_.expert_down, "ffn_down", {s_.D, s_.F}}})
      for (int64_t e = 0; e < s_.E; ++e)
        expert(moe + "experts." + std::to_string(e) + "." + part.name + ".weight", from, part.site, e, part.shape);
  }

  const GgufFile& file_;
  const Architecture& a_;
  const Sizes& s_;
  std::shared_ptr<StackedReader> stacked_;
  std::vector<ModelTensor> tensors_;
  std::set<std::string> used_;
};

}  // namespace

ImportReport import_gguf(const std::filesystem::path& path, const std::filesystem::path& dir,
                         const ImportOptions& options) {
  const GgufFile file(path);
  const Architecture& a = find_architecture(file);
  const Sizes s = read_sizes(file, a);
  const bool tied = !file.contains("output.weight");
  const Json config = make_config(file, a, s, tied, options.dtype);
  const std::optional<GgufTokenizer> tokenizer = read_gguf_tokenizer(file);
  const auto tensors = Plan(file, a, s).take();

  ModelDirectory out(dir);
  out.write_weights(tensors, {options.dtype, options.max_shard_bytes});
  if (tokenizer) {
    out.write_json("tokenizer.json", tokenizer->tokenizer);
    out.write_json("tokenizer_config.json", tokenizer->config);
    const int64_t ids = tokenizer::load_tokenizer(out.path())->size();  // what was written can be read
    MOEGRAFT_CHECK(ids <= s.V, path.string(), ": ", ids, " tokens for ", s.V, " rows of token_embd.weight");
  } else {
    log::warning(path.string(), " holds no tokenizer: put the model's tokenizer.json into ", dir.string());
  }
  Json generation{{"bos_token_id", config["bos_token_id"]},
                  {"eos_token_id", config["eos_token_id"]},
                  {"pad_token_id", config["pad_token_id"]}};
  out.write_json("generation_config.json", generation);
  out.write_json("config.json", config);
  out.publish();
  ImportReport report{a.gguf, config["model_type"], 0, s.E, tied};
  for (const auto& t : tensors) {
    int64_t elements = 1;
    for (const int64_t size : t.shape) elements *= size;
    report.parameters += elements;
  }
  return report;
}

}  // namespace moegraft::convert
