// Counts what the autograd functions of model/ and kernels/ keep. tests/train/memory_plan_test.cpp compares it with
// what they really keep.
#include "moegraft/planning/memory.h"

#include "libtorch.h"

#include <algorithm>
#include <cstdio>

#include "gpu_memory.h"
#include "moegraft/adapters/adapter.h"
#include "moegraft/base/check.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/data/deal.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/json.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/kernels/optimizer.h"
#include "moegraft/model/expert_ring.h"
#include "moegraft/model/tensors.h"
#include "moegraft/model/weights.h"
#include "moegraft/parallel/gradients.h"

namespace moegraft::planning {
namespace {

using model::Site;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kProgram = 120 * kMiB;  // resident in `moegraft inspect`, which does nothing: the binary and LibTorch
constexpr int64_t kThreadScratch = 16 * kMiB;  // kernels' memory per thread
constexpr int64_t kExpertSites = 3;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Every count of one request, with its sizes at hand.
class Counter {
 public:
  explicit Counter(const MemoryRequest& request)
      : r_(request),
        s_(request.spec),
        width_(int64_t(c10::elementSize(request.dtype))),
        T_(request.tokens),
        R_(request.tokens * s_.num_experts_per_tok),
        E_(request.spec.num_experts / request.expert_size),
        q_(s_.num_heads * s_.head_dim),
        kv_(s_.num_kv_heads * s_.head_dim),
        panels_(request.device.is_cpu() && !request.base_trains &&
                kernels::pack_weight(at::empty({16, 16}, at::TensorOptions(request.dtype))).packed() != nullptr) {}

  bool has_panels() const { return panels_; }
  int64_t experts_of_layer() const { return kExpertSites * E_ * s_.hidden_size * s_.moe_intermediate_size; }
  int64_t sparse_layers() const {
    return std::count_if(s_.layers.begin(), s_.layers.end(), [](const auto& l) { return l.sparse; });
  }

  // Resident: everything, except what is mapped and has been packed into panels.
  int64_t base() const {
    if (r_.base_trains) return 0;  // masters
    if (quantised()) return quantised_base();
    int64_t elements = s_.num_parameters() - sparse_layers() * kExpertSites * (s_.num_experts - E_) * s_.hidden_size *
                                                 s_.moe_intermediate_size;
    if (experts_visit() || (panels_ && !r_.converted)) elements -= sparse_layers() * experts_of_layer();
    if (panels_ && !r_.converted) {
      for_each_matrix([&](int64_t n, int64_t k) { elements -= n * k; });
      if (s_.tie_word_embeddings) elements += s_.vocab_size * s_.hidden_size;  // looked up all the time
    }
    return elements * width_;
  }
  int64_t panels() const {
    if (!panels_ || quantised()) return 0;
    const int64_t pair = width_ == 2 ? 2 : 1;
    int64_t elements = 0;
    const auto both = [&](int64_t n, int64_t k) {
      return round_up(k, pair) * round_up(n, 16) + round_up(n, pair) * round_up(k, 16);
    };
    for_each_matrix([&](int64_t n, int64_t k) { elements += both(n, k); });
    // Gate and up are [F, D], down [D, F]. Large experts keep the forward layout alone where that serves both passes.
    const int64_t D = s_.hidden_size, F = s_.moe_intermediate_size;
    const int64_t expert = !model::packs_lean(s_) || !kernels::one_layout_serves(r_.dtype)
                               ? 2 * both(F, D) + both(D, F)
                               : 2 * round_up(D, pair) * round_up(F, 16) + round_up(F, pair) * round_up(D, 16);
    if (!experts_visit()) elements += sparse_layers() * E_ * expert;
    return elements * width_;
  }

  // Panels of the format's blocks, and what stays floats.
  int64_t quantised_base() const {
    const auto& row = kernels::format_row(*r_.quantise);
    int64_t bytes = 0, elements = s_.num_parameters() - sparse_layers() * kExpertSites * s_.num_experts *
                                                            s_.hidden_size * s_.moe_intermediate_size;
    const auto store = [&](int64_t n, int64_t k) { bytes += row.bytes(round_up(n, 16), k); };
    const auto one = [&](int64_t n, int64_t k) { store(n, k), elements -= n * k; };
    one(s_.vocab_size, s_.hidden_size);  // the embedding; the head, tied or not, is among the linear layers
    for_each_matrix(one);
    if (s_.tie_word_embeddings)
      bytes -= row.bytes(round_up(s_.vocab_size, 16), s_.hidden_size),
          elements += s_.vocab_size * s_.hidden_size;  // counted twice
    for (int64_t i = 0; i < sparse_layers() * E_; ++i)
      store(s_.moe_intermediate_size, s_.hidden_size), store(s_.moe_intermediate_size, s_.hidden_size),
          store(s_.hidden_size, s_.moe_intermediate_size);
    return bytes + elements * width_;
  }

  // Kept for the backward pass of one layer.
  int64_t layer(int64_t l) const {
    const int64_t D = s_.hidden_size;
    int64_t bytes = 2 * T_ * (D + 1) * 4;  // the norms' sums and statistics
    bytes += attention();
    for (const auto& adapter : r_.adapters) bytes += dense_terms(adapter, l) + made_factors(adapter, l);
    // What the low-rank terms multiply: the layer's normed input, and (where rows are gathered) attention's output once
    // more.
    if (any_term(l, {Site::q, Site::k, Site::v})) bytes += T_ * D * width_;
    if (!r_.gate_open && any_term(l, {Site::o})) bytes += T_ * q_ * width_;
    if (!s_.layers[size_t(l)].sparse) return bytes + dense(l);
    return bytes + experts(l) + shared_expert();
  }
  int64_t layer_input() const { return T_ * s_.hidden_size * 4; }

  int64_t loss() const {
    const int64_t D = s_.hidden_size, V = s_.vocab_size;
    const auto chunk = [&](int64_t classes) {
      return std::min(T_, kernels::cross_entropy_chunk(T_, classes, r_.device.is_cuda())) * classes;
    };
    const int64_t per_logit =
        r_.device.is_cuda() ? width_ : 8 + width_;  // one buffer in place, or log-probabilities beside logits
    int64_t bytes = T_ * D * (4 + 4 * width_);      // final norm, labelled rows and their gradients
    const int64_t logits = panels_ ? 0 : chunk(V), rows = chunk(r_.new_rows);
    return bytes + std::max(logits, rows) * per_logit + (r_.base_trains ? V * D * 4 : 0) + scratch();
  }
  // Of the largest layer, besides what it keeps: routed rows on their way, gradients of attention, factors as products
  // want them.
  int64_t workspace() const {
    const int64_t D = s_.hidden_size, F = s_.moe_intermediate_size;
    int64_t largest = 0;
    for (int64_t l = 0; l < s_.num_layers; ++l) {
      const int64_t around = T_ * (2 * q_ + 2 * kv_ + 2 * D) * width_ + T_ * D * 4;
      int64_t bytes = 0;
      if (s_.layers[size_t(l)].sparse) {
        bytes += R_ * D * width_ + (panels_ ? 0 : R_ * (2 * D + 4 * F) * width_);
        bytes +=
            expert_columns(l) * E_ * (D + F) *
            (panels_ ? 4 : 4 + width_);  // gradients' sums where an expert's rows are many; factors, but for panels
        bytes += (travelled() - 1) * T_ * D * width_;  // partial sums on their way back
      } else {
        bytes += 4 * T_ * s_.intermediate_size * width_;
      }
      largest = std::max(
          largest,
          around + std::max(bytes, flash_backward()));  // attention's turn comes when the experts' rows are gone
    }
    return largest + scratch();
  }

  TrainedParameters trained() const {
    TrainedParameters t;
    for (const auto& a : r_.adapters)
      for (int64_t l = 0; l < s_.num_layers; ++l)
        for (const Site site : a.sites) {
          if (!acts(a, site, l)) continue;
          t.lora += trained_at(a, site);
        }
    t.rows = r_.new_rows * s_.hidden_size * (s_.tie_word_embeddings ? 1 : 2);
    t.base = r_.base_trains ? s_.num_parameters() : 0;
    return t;
  }

  std::vector<run::TrainedRow> table() const {
    std::vector<run::TrainedRow> rows;
    const auto add = [&](const std::string& what, const std::string& where, int64_t parameters) {
      rows.push_back({what, where, parameters, 4 * parameters});
    };
    for (size_t i = 0; i < r_.adapters.size(); ++i)
      for (const Site site : r_.adapters[i].sites) {
        const auto& a = r_.adapters[i];
        int64_t layers = 0;
        for (int64_t l = 0; l < s_.num_layers; ++l) layers += acts(a, site, l);
        const bool experts = adapters::is_per_expert(s_, site);
        add(moegraft::detail::concat("adapters[", i, "] ", adapters::site_name(site), ", rank ", a.rank),
            moegraft::detail::concat(layers, " layers", experts ? moegraft::detail::concat(" x ", E_, " experts") : ""),
            layers * trained_at(a, site));
      }
    const TrainedParameters all = trained();
    if (all.rows)
      add(s_.tie_word_embeddings ? "new rows of embedding and head (tied)" : "new rows of embedding and head",
          moegraft::detail::concat(r_.new_rows, " tokens"), all.rows);
    if (all.base) add("the base", moegraft::detail::concat(s_.num_layers, " layers"), all.base);
    return rows;
  }

  bool experts_visit() const { return r_.offload_experts || (r_.shard_base && r_.data_size > 1); }

 private:
  bool quantised() const { return r_.quantise && panels_; }  // without panels its values are floats
  // How many processes a token visits at most; as many tokens come as go when experts are used evenly.
  int64_t travelled() const { return std::min(r_.expert_size, s_.num_experts_per_tok); }
  // Matrices with panels besides the experts': [out, in].
  template <class F>
  void for_each_matrix(const F& f) const {
    if (s_.tie_word_embeddings) f(s_.vocab_size, s_.hidden_size);  // the head
    for (const auto& t : model::tensor_shapes(s_))
      if (model::is_linear_layer(t.role)) f(t.shape[0], t.shape[1]);
  }
  // Where the library's flash attention serves (kernels/cuda/attention.cpp).
  int64_t flash_backward() const {
    if (!r_.device.is_cuda() || width_ != 2 || s_.head_dim % 8 != 0 || s_.head_dim > 256) return 0;
    return gpu::flash_backward(T_, r_.sequences, s_.num_heads, s_.num_kv_heads, s_.head_dim, width_);
  }
  int64_t scratch() const { return r_.device.is_cpu() ? at::get_num_threads() * kThreadScratch : 0; }

  bool acts(const MemoryRequest::Adapter& a, Site site, int64_t l) const {
    if (!a.layers.empty() && std::find(a.layers.begin(), a.layers.end(), l) == a.layers.end()) return false;
    return adapters::has_site(s_, l, site);
  }
  // Numbers trained at a site of one layer.
  int64_t trained_at(const MemoryRequest::Adapter& a, Site site) const {
    int64_t sum = 0;
    for (const int64_t size : adapters::trained_sizes(a.kind, a.rank, adapters::site_shape(s_, site))) sum += size;
    return sum * (adapters::is_per_expert(s_, site) ? E_ : 1);
  }
  // Factors that a layer's pass makes and keeps.
  int64_t made_factors(const MemoryRequest::Adapter& a, int64_t l) const {
    int64_t elements = 0;
    for (const Site site : a.sites) {
      if (!adapters::makes_factors(a.kind) || !acts(a, site, l)) continue;
      const auto [in, out] = adapters::site_shape(s_, site);
      elements += a.rank * (in + out) * (adapters::is_per_expert(s_, site) ? E_ : 1);
    }
    return elements * 4;
  }
  bool any_term(int64_t l, const std::vector<Site>& sites) const {
    for (const auto& a : r_.adapters)
      for (const Site site : a.sites)
        if (std::find(sites.begin(), sites.end(), site) != sites.end() && acts(a, site, l)) return true;
    return false;
  }

  int64_t attention() const {
    const int64_t heads = s_.num_heads + s_.num_kv_heads;
    int64_t bytes =
        T_ * (2 * q_ + 2 * kv_) * width_ + T_ * s_.num_heads * 4;  // q, k, v, out and the softmax's normaliser
    if (s_.qk_norm != model::QkNorm::none)
      bytes += T_ * (q_ + kv_) * width_ + T_ * (s_.qk_norm == model::QkNorm::per_head ? heads : 2) * 4;
    if (s_.clip_qkv > 0) bytes += T_ * (q_ + 2 * kv_) * width_;
    if (r_.base_trains) bytes += T_ * s_.hidden_size * width_;
    return bytes;
  }
  int64_t experts(int64_t l) const {
    const int64_t D = s_.hidden_size, F = s_.moe_intermediate_size, K = s_.num_experts_per_tok, E = s_.num_experts;
    int64_t bytes = T_ * (E * 4 + K * (8 + 4 + 4)) + (s_.router.renormalise ? T_ * 4 : 0) +
                    (width_ == 2 ? E * D * 4 : 0);        // the router
    bytes += 2 * R_ * 4 + travelled() * T_ * D * width_;  // the sort, the input
    if (!panels_) return bytes + 2 * R_ * F * width_ + (r_.device.is_cuda() ? R_ * expert_columns(l) * width_ : 0);
    return bytes + R_ * (2 * round_up(F, 64) + expert_columns(l)) * width_;
  }
  // Columns of the thin products of a row.
  int64_t expert_columns(int64_t l) const {
    int64_t columns = 0;
    for (const Site site : {Site::gate, Site::up, Site::down}) {
      int64_t rank = 0;
      for (const auto& a : r_.adapters)
        if (std::find(a.sites.begin(), a.sites.end(), site) != a.sites.end() && acts(a, site, l)) rank += a.rank;
      columns += round_up(rank, 16);
    }
    return columns;
  }
  int64_t gated_ffn(int64_t I) const {
    return 3 * T_ * I * width_ + (r_.base_trains ? T_ * (s_.hidden_size + I) * width_ : 0);
  }
  int64_t dense(int64_t l) const {
    const int64_t I = s_.intermediate_size;
    int64_t bytes = gated_ffn(I);
    // What the terms multiply: the normed input, and (where rows are gathered) the activation once more.
    if (any_term(l, {Site::gate, Site::up})) bytes += T_ * s_.hidden_size * width_;
    if (any_term(l, {Site::down})) bytes += T_ * I * width_;
    return bytes;
  }
  // Its output and its scale are kept for each other's gradients.
  int64_t shared_expert() const {
    const auto& shared = s_.shared_expert;
    return shared.intermediate_size > 0
               ? gated_ffn(shared.intermediate_size) + (shared.gated ? T_ * (s_.hidden_size + 1) * width_ : 0)
               : 0;
  }
  // Low-rank terms of attention and of dense FFNs: thin products, factors in the compute dtype, and where rows are
  // gathered, what is added to them.
  int64_t dense_terms(const MemoryRequest::Adapter& a, int64_t l) const {
    int64_t bytes = 0;
    for (const Site site : a.sites) {
      if (adapters::is_per_expert(s_, site) || !acts(a, site, l)) continue;
      const auto [in, out] = adapters::site_shape(s_, site);
      bytes += T_ * a.rank * width_ + (width_ == 2 ? a.rank * (in + out) * width_ : 0) +
               (r_.gate_open ? 0 : T_ * out * width_);
    }
    return bytes;
  }

  const MemoryRequest& r_;
  const model::DecoderSpec& s_;
  int64_t width_, T_, R_, E_, q_, kv_;  // E: experts here
  bool panels_;
};

// The backward pass frees layers from the last on; a recomputed layer is whole again while its turn lasts.
int64_t activation_peak(const MemoryPlan& plan, int64_t recomputed) {
  const int64_t L = int64_t(plan.layer_stored.size());
  int64_t inputs = 0, during = 0, stored = 0;
  for (int64_t l = 0; l < recomputed; ++l) {
    inputs += plan.layer_recomputed[size_t(l)];
    during = std::max(during, inputs + plan.layer_stored[size_t(l)]);
  }
  for (int64_t l = recomputed; l < L; ++l) stored += plan.layer_stored[size_t(l)];
  return std::max(inputs + stored, during);
}

std::string gib(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, bytes < 10 * (int64_t{1} << 30) ? "%.3f GiB" : "%.1f GiB",
                double(bytes) / double(int64_t{1} << 30));
  return text;
}

bool stored_as(const std::string& dir, at::ScalarType dtype) {
  const io::Json config = io::read_json(std::filesystem::path(dir) / "config.json");
  for (const char* key : {"dtype", "torch_dtype"})
    if (config.contains(key) && config.at(key).is_string())
      return config.at(key).get<std::string>() == (dtype == at::kFloat ? "float32" : "bfloat16");
  return dtype == at::kFloat;
}

}  // namespace

MemoryRequest memory_request(const model::DecoderSpec& spec, const run::RunConfig& config,
                             const model::Vocabulary& vocabulary, at::Device device, int64_t processes) {
  MemoryRequest r;
  r.spec = spec;
  r.dtype = graft::parse_dtype(config.model.dtype);
  r.device = device;
  r.quantise = model::weight_format(config.model.quantize);
  r.base_trains = config.train.base_weights == train::BaseWeights::full;
  r.offload_experts = config.model.offload == model::Offload::experts;
  r.moments_8bit = config.train.optimizer == train::OptimizerKind::adamw_8bit;
  r.narrow_gradients = config.train.gradients == train::GradientDtype::bf16;
  r.converted = !config.model.path.empty() && !stored_as(config.model.path, r.dtype);
  r.auxiliary_loss = r.base_trains && spec.has_experts() && spec.router_aux_loss_coef > 0;
  r.tokens = data::largest_micro_batch(config.data, {config.train.accumulation, 0, processes});
  r.sequences = (r.tokens + config.data.sequence_length - 1) / config.data.sequence_length;
  r.expert_size = config.parallel.expert;
  r.data_size = std::max<int64_t>(processes / r.expert_size, 1);
  r.shard_base = config.parallel.shard_base;
  r.shard_optimizer = config.parallel.shard_optimizer;
  r.bucket_bytes = int64_t(config.parallel.bucket_mib * double(kMiB));
  r.async_saves = config.checkpoint.async;
  const bool text_trains = std::any_of(config.adapters.begin(), config.adapters.end(), [](const auto& a) {
    return std::find(a.modality.begin(), a.modality.end(), "text") != a.modality.end();
  });
  if (!r.base_trains && !text_trains && !r.offload_experts && r.expert_size == 1 && !(r.shard_base && r.data_size > 1))
    r.prefix_cache = config.train.prefix_cache_mib * kMiB;
  for (const auto& m : vocabulary.modalities) r.new_rows += m.num_rows();
  for (const auto& a : config.adapters) {
    MemoryRequest::Adapter adapter{a.rank, {}, a.layers, a.kind};
    for (const auto& name : a.sites) adapter.sites.push_back(adapters::parse_site(name));
    r.adapters.push_back(std::move(adapter));
  }
  r.budget_bytes = int64_t(config.train.memory_budget_gib * double(int64_t{1} << 30));
  return r;
}

TrainedParameters count_trained(const MemoryRequest& request) {
  MemoryRequest whole = request;
  whole.expert_size = 1;
  return Counter(whole).trained();
}

std::vector<run::TrainedRow> trained_table(const MemoryRequest& request) {
  MemoryRequest whole = request;
  whole.expert_size = 1;
  return Counter(whole).table();
}

std::vector<std::string> format_trained(const std::vector<run::TrainedRow>& rows, int64_t base_parameters) {
  int64_t total = 0;
  size_t what = 5, where = 0;
  for (const auto& row : rows)
    total += row.parameters, what = std::max(what, row.what.size()), where = std::max(where, row.where.size());
  const bool base_itself =
      std::any_of(rows.begin(), rows.end(), [](const auto& row) { return row.what == "the base"; });
  const double all = double(total) + (base_itself ? 0.0 : double(base_parameters));
  std::vector<std::string> lines;
  const auto add = [&](const std::string& name, const std::string& place, int64_t parameters) {
    char text[256];
    std::snprintf(text, sizeof text, "%-*s  %-*s  %10s  %9.1f MiB  %6.2f %%", int(what), name.c_str(), int(where),
                  place.c_str(), format_count(double(parameters)).c_str(), 4.0 * double(parameters) / double(kMiB),
                  100.0 * double(parameters) / std::max(all, 1.0));
    lines.emplace_back(text);
  };
  for (const auto& row : rows) add(row.what, row.where, row.parameters);
  if (rows.size() > 1) add("total", "", total);
  return lines;
}

MemoryPlan plan_memory(const MemoryRequest& request) {
  const Counter count(request);
  const model::DecoderSpec& s = request.spec;
  const int64_t width = int64_t(c10::elementSize(request.dtype)), trained = count.trained().total();
  MemoryPlan plan;
  plan.budget = request.budget_bytes;
  // A context that exists is not free any more and counts below too: on the safe side.
  if (plan.budget == 0 && request.free_bytes > 0) {
    plan.budget = int64_t(gpu::kShareOfFree * double(request.free_bytes));
    plan.budget_source = moegraft::detail::concat(gpu::kShareOfFree, " of what ", request.device.str(), " has free");
  }
  plan.program = request.device.is_cpu() ? kProgram : gpu::kContext;
  if (request.device.is_cuda()) plan.collectives = gpu::collectives(request);
  plan.base = count.base();
  plan.panels = count.panels();
  if (count.experts_visit() && count.sparse_layers() > 0) {
    const int64_t experts = count.sparse_layers() * count.experts_of_layer() * width;
    plan.offload_buffers = model::kRingBuffers * count.experts_of_layer() * width;
    if (request.offload_experts)
      plan.host_experts = experts;
    else
      plan.base += experts / request.data_size;
  }
  plan.trained = plan.gradients = 4 * trained;
  if (request.narrow_gradients) {
    plan.gradients = 2 * trained;
    if (request.expert_size * request.data_size > 1)
      plan.gradients += std::min(4 * trained, int64_t(parallel::GradientReducer::kUnderWay) * request.bucket_bytes);
  }
  plan.optimizer = request.moments_8bit ? 2 * trained + 2 * trained * 4 / kernels::kAdamw8Block : 8 * trained;
  plan.prefix_cache = request.prefix_cache;
  // A save's tensors are dealt out to the processes that hold them.
  if (request.async_saves && request.device.is_cpu())
    plan.save_copies = (plan.trained + plan.optimizer) / request.data_size;
  if (request.shard_optimizer) plan.optimizer /= request.data_size;  // expert factors are most of it
  for (int64_t l = 0; l < s.num_layers; ++l) {
    plan.layer_stored.push_back(count.layer(l));
    plan.layer_recomputed.push_back(count.layer_input());
  }
  plan.loss = count.loss();
  plan.workspace = count.workspace();
  // Measured: what comes and goes within a step leaves holes of about its own size (tools/moegraft/startup.h keeps
  // pages); within 5 % of the process's peak.
  if (request.device.is_cpu() && s.num_layers > 0)
    plan.heap = *std::max_element(plan.layer_stored.begin(), plan.layer_stored.end()) + plan.loss + plan.workspace;

  const auto with = [&](int64_t n) {
    plan.recompute_layers = n;
    plan.activations = activation_peak(plan, n);
    return plan.total();
  };
  if (count.experts_visit()) {  // the buffers pass on: every layer asks again
    plan.smallest = with(request.auxiliary_loss ? 0 : s.num_layers);
    return plan;
  }
  // Recomputing the last layer too saves nothing: it is whole while its turn lasts.
  const int64_t most = request.auxiliary_loss ? 0 : s.num_layers - 1;
  int64_t best = 0;
  for (int64_t n = 0; n <= most; ++n) {
    const int64_t total = with(n);
    if (n == 0 || total < plan.smallest) plan.smallest = total, best = n;
  }
  for (int64_t n = 0; n <= most; ++n) {
    with(n);
    if (plan.fits()) return plan;
  }
  with(best);
  return plan;
}

std::string fit_problem(const MemoryPlan& plan, const MemoryRequest& r) {
  const std::string budget = plan.budget_source.empty() ? "train.memory_budget_gib: " + gib(plan.budget)
                                                        : gib(plan.budget) + " (" + plan.budget_source + ")";
  // What this run does not do yet.
  std::vector<std::string> remedies{
      plan.budget_source.empty() ? "raise it" : "set train.memory_budget_gib to try with more",
      "raise train.accumulation (fewer tokens at a time)", "lower data.tokens_per_step"};
  if (!r.moments_8bit) remedies.push_back("use train.optimizer: adamw_8bit");
  if (!r.narrow_gradients) remedies.push_back("use train.gradients: bf16");
  if (!r.quantise && !r.base_trains && !r.shard_base && !r.offload_experts && r.device.is_cpu())
    remedies.push_back("use model.quantize: q8_0");
  if (!r.quantise && !r.offload_experts && !r.base_trains && !r.shard_base && r.spec.has_experts())
    remedies.push_back("keep experts in host memory with model.offload: experts");
  const std::string last = remedies.back();
  remedies.pop_back();
  return moegraft::detail::concat(budget, " is too little: the smallest possible total is ", gib(plan.smallest),
                                  ", with ", plan.recompute_layers, " of ", plan.layer_stored.size(),
                                  " layers recomputed; ", join(remedies, ", "), ", or ", last);
}

void check_fits(const MemoryPlan& plan, const MemoryRequest& request) {
  MOEGRAFT_CHECK(plan.fits(), fit_problem(plan, request));
}

std::string summary(const MemoryPlan& plan) {
  std::string text = "memory plan: " + gib(plan.total()) + " (base " + gib(plan.base + plan.offload_buffers) +
                     (plan.panels ? ", packed copies " + gib(plan.panels) : "") +
                     ", trained with gradients and optimizer " + gib(plan.trained + plan.gradients + plan.optimizer) +
                     ", activations " + gib(plan.activations) + ", work space " +
                     gib(std::max(plan.loss, plan.workspace) + plan.heap) +
                     (plan.save_copies ? ", copies for checkpoints " + gib(plan.save_copies) : "") +
                     (plan.prefix_cache ? ", captions " + gib(plan.prefix_cache) : "") +
                     (plan.collectives ? ", collectives " + gib(plan.collectives) : "") + ")";
  if (plan.budget > 0)
    text += " of " + gib(plan.budget) + (plan.budget_source.empty() ? "" : ", " + plan.budget_source);
  text += "; " + std::to_string(plan.recompute_layers) + " of " + std::to_string(plan.layer_stored.size()) +
          " layers recomputed";
  if (plan.host_experts) text += "; experts in host memory " + gib(plan.host_experts);
  return text;
}

}  // namespace moegraft::planning
