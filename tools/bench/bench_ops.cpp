// moegraft bench ops: each fused operation beside the same written plainly with LibTorch, and beside the large matrix
// product that this machine can do.
#include <ATen/DeviceAccelerator.h>
#include <torch/csrc/autograd/autograd.h>

#include "libtorch.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/expert_layout.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/model/weights.h"

namespace moegraft::tools::bench {
namespace {

namespace k = kernels;
using Tensors = std::vector<at::Tensor>;

struct OpsOptions {
  std::string model, dtype = "bfloat16", device = "cpu";
  std::vector<std::string> only;
  int64_t tokens = 2048, seq = 512, hidden = 512, width = 256, experts = 32, top_k = 4, rank = 16, heads = 8,
          kv_heads = 4, head_dim = 64, vocab = 8192, rounds = 5, threads = 0, matmul = 0;
  bool json = false;
};

// One operation in two versions. `inputs` are what gradients are asked for; grad_of weighs the output.
struct OpCase {
  std::string name;
  double forward_flops = 0, backward_flops = 0;  // of the work itself; 0: bound by memory
  Tensors inputs;
  std::function<at::Tensor()> ours, plain;
};

struct Timing {
  double best_s = 0;
  double device_mib = 0;
};

struct Shapes {
  OpsOptions o;
  at::ScalarType dtype;
  at::Device device;
  at::Tensor normal(at::IntArrayRef sizes, double std = 1.0) const {
    return (at::empty(sizes, at::TensorOptions(at::kFloat).device(device)).normal_() * std).to(dtype);
  }
  at::Tensor leaf(at::IntArrayRef sizes, double std = 1.0) const { return normal(sizes, std).requires_grad_(true); }
  at::Tensor master(at::IntArrayRef sizes, double std) const {
    return (at::empty(sizes, at::TensorOptions(at::kFloat).device(device)).normal_() * std).requires_grad_(true);
  }
  std::vector<int64_t> sequences() const {
    std::vector<int64_t> cu{0};
    while (cu.back() < o.tokens) cu.push_back(std::min(o.tokens, cu.back() + o.seq));
    return cu;
  }
};

OpCase moe_case(const Shapes& s) {
  const auto& o = s.o;
  const double d = 1 / std::sqrt(double(o.hidden)), f = 1 / std::sqrt(double(o.width));
  k::ExpertFfnWeights w;
  w.gate_FD = s.normal({o.experts, o.width, o.hidden}, d).unbind(0),
  w.up_FD = s.normal({o.experts, o.width, o.hidden}, d).unbind(0);
  w.down_DF = s.normal({o.experts, o.hidden, o.width}, f).unbind(0);
  k::join_experts(w.gate_FD, w.up_FD, w.down_DF);  // as a model's lie on a device: gate and up are one product
  w.panels = k::make_expert_panels(w);
  const auto term = [&](int64_t in, int64_t out) {
    return k::ExpertLowRank{s.master({o.experts, o.rank, in}, 1 / std::sqrt(double(in))),
                            s.master({o.experts, out, o.rank}, 0.01),
                            2.0,
                            {true}};
  };
  k::ExpertFfnAdapters a{{term(o.hidden, o.width)}, {term(o.hidden, o.width)}, {term(o.width, o.hidden)}};
  const at::Tensor x = s.leaf({o.tokens, o.hidden});
  const at::Tensor probs =
      at::softmax(at::empty({o.tokens, o.experts}, x.options().dtype(at::kFloat).requires_grad(false)).normal_(), -1);
  const auto [weights_given, ids] = at::topk(probs, o.top_k, -1);
  const at::Tensor weights = weights_given.detach().clone().requires_grad_(true);
  Tensors inputs{x, weights};
  for (auto* list : {&a.gate, &a.up, &a.down})
    for (auto& t : *list) inputs.insert(inputs.end(), {t.A_EPX, t.B_EXP});
  const double rows = double(o.tokens * o.top_k), base = 2 * rows * 3 * double(o.hidden * o.width),
               lora = 2 * rows * 3 * double(o.rank * (o.hidden + o.width));
  const auto ours = [=] { return k::moe_ffn(x, weights, k::make_dispatch(ids, o.experts, {}, 1), w, a); };
  // One expert after the other on its own tokens, adapters in the compute dtype.
  const auto plain = [=] {
    at::Tensor out = at::zeros_like(x);
    const auto low_rank = [&](const at::Tensor& in, const k::ExpertLowRank& t, int64_t e) {
      return at::linear(at::linear(in, t.A_EPX[e].to(in.scalar_type())), t.B_EXP[e].to(in.scalar_type())) * t.scale;
    };
    for (int64_t e = 0; e < o.experts; ++e) {
      const auto where = at::where(ids == e);
      const at::Tensor in = x.index_select(0, where[0]);
      const at::Tensor h = at::silu(at::linear(in, w.gate_FD[e]) + low_rank(in, a.gate[0], e)) *
                           (at::linear(in, w.up_FD[e]) + low_rank(in, a.up[0], e));
      const at::Tensor y = at::linear(h, w.down_DF[e]) + low_rank(h, a.down[0], e);
      out = out.index_add(0, where[0], y * weights.index({where[0], where[1]}).unsqueeze(1).to(y.scalar_type()));
    }
    return out;
  };
  return {"moe_ffn", base + lora, base + 2 * lora, inputs, ours, plain};
}

OpCase dispatch_case(const Shapes& s) {
  const auto& o = s.o;
  const at::Tensor x = s.normal({o.tokens, o.hidden});
  const at::Tensor ids =
      std::get<1>(at::topk(at::empty({o.tokens, o.experts}, x.options().dtype(at::kFloat)).normal_(), o.top_k, -1));
  return {"dispatch+permute",
          0,
          0,
          {},
          [=] { return k::permute(x, k::make_dispatch(ids, o.experts, {}, 1)); },
          [=] {
            return x.index_select(
                0, at::floor_divide(std::get<1>(at::sort(ids.reshape({-1}), /*stable=*/true, 0, false)), o.top_k));
          }};
}

OpCase attention_case(const Shapes& s) {
  const auto& o = s.o;
  const auto cu = s.sequences();
  const at::Tensor q = s.leaf({o.tokens, o.heads, o.head_dim}), key = s.leaf({o.tokens, o.kv_heads, o.head_dim}),
                   v = s.leaf({o.tokens, o.kv_heads, o.head_dim});
  const double scale = 1 / std::sqrt(double(o.head_dim));
  double pairs = 0;
  for (size_t i = 1; i < cu.size(); ++i) pairs += 0.5 * double(cu[i] - cu[i - 1]) * double(cu[i] - cu[i - 1] + 1);
  const double flops = 4 * pairs * double(o.heads * o.head_dim);
  const auto plain = [=] {
    Tensors out;
    for (size_t i = 1; i < cu.size(); ++i) {
      const auto part = [&](const at::Tensor& t) {
        return t.narrow(0, cu[i - 1], cu[i] - cu[i - 1]).transpose(0, 1).unsqueeze(0);
      };
      out.push_back(at::scaled_dot_product_attention(part(q), part(key), part(v), {}, 0.0, true, scale,
                                                     /*enable_gqa=*/o.heads != o.kv_heads)
                        .squeeze(0)
                        .transpose(0, 1));
    }
    return at::cat(out, 0);
  };
  return {"packed_attention",
          flops,
          2 * flops,
          {q, key, v},
          [=] { return k::packed_attention(q, key, v, cu, cu, 0, scale); },
          plain};
}

OpCase qkv_case(const Shapes& s) {
  const auto& o = s.o;
  const at::Tensor x = s.leaf({o.tokens, o.hidden});
  std::vector<k::FrozenLinearWeight> w;
  double parameters = 0;
  for (const int64_t heads : {o.heads, o.kv_heads, o.kv_heads}) {
    const at::Tensor weight = s.normal({heads * o.head_dim, o.hidden}, 1 / std::sqrt(double(o.hidden)));
    w.push_back({k::pack_weight(weight), {}});
    parameters += double(weight.numel());
  }
  const auto plain = [=] {
    Tensors out;
    for (const auto& part : w) out.push_back(at::linear(x, part.weight_NK.tensor()));
    return at::cat(out, 1);
  };
  const double flops = 2 * double(o.tokens) * parameters;
  return {"frozen_linear q,k,v", flops, flops, {x}, [=] { return at::cat(k::frozen_linear(x, w), 1); }, plain};
}

OpCase norm_case(const Shapes& s) {
  const at::Tensor x = s.leaf({s.o.tokens, s.o.hidden}), w = s.normal({s.o.hidden});
  return {"rms_norm",
          0,
          0,
          {x},
          [=] { return k::rms_norm(x, w, 1e-6); },
          [=] { return at::rms_norm(x, {s.o.hidden}, w, 1e-6); }};
}

OpCase residual_case(const Shapes& s) {
  const at::Tensor x = at::empty({s.o.tokens, s.o.hidden}, at::TensorOptions(at::kFloat).device(s.device))
                           .normal_()
                           .requires_grad_(true),
                   delta = s.leaf({s.o.tokens, s.o.hidden}), w = s.normal({s.o.hidden});
  const auto join = [](const at::Tensor& sum, const at::Tensor& y) { return sum + y; };  // both outputs carry gradients
  return {"residual_norm",
          0,
          0,
          {x, delta},
          [=] {
            const auto r = k::residual_norm(x, delta, w, 1e-6, s.dtype);
            return join(r.x_XD, r.y_XD);
          },
          [=] {
            const at::Tensor sum = x + delta;
            return join(sum, at::rms_norm(sum, {s.o.hidden}, w.to(at::kFloat), 1e-6).to(s.dtype));
          }};
}

OpCase rotary_case(const Shapes& s) {
  const auto& o = s.o;
  const at::Tensor x = s.leaf({o.tokens, o.heads, o.head_dim});
  const at::Tensor angle =
      at::arange(o.tokens, at::TensorOptions(at::kFloat).device(s.device)).remainder(o.seq).unsqueeze(1) *
      at::pow(1e4, -at::arange(o.head_dim / 2, at::TensorOptions(at::kFloat).device(s.device)) / (o.head_dim / 2));
  const at::Tensor cos = angle.cos(), sin = angle.sin();
  const auto plain = [=] {
    const auto halves = x.chunk(2, -1);
    const at::Tensor c = cos.unsqueeze(1).to(s.dtype), n = sin.unsqueeze(1).to(s.dtype);
    return at::cat({halves[0] * c - halves[1] * n, halves[1] * c + halves[0] * n}, -1);
  };
  return {"rotary", 0, 0, {x}, [=] { return k::rotary(x, cos, sin); }, plain};
}

OpCase loss_case(const Shapes& s) {
  const auto& o = s.o;
  const at::Tensor h = s.leaf({o.tokens, o.hidden}), w = s.normal({o.vocab, o.hidden}, 1 / std::sqrt(double(o.hidden)));
  const at::Tensor targets = random_ids({o.tokens}, o.vocab).to(s.device);
  const double flops = 2 * double(o.tokens) * double(o.hidden * o.vocab);
  return {"linear_cross_entropy",
          flops,
          flops,
          {h},
          [=] { return k::linear_cross_entropy(h, w, targets, 1.0 / double(o.tokens)); },
          [=] { return at::cross_entropy_loss(at::linear(h, w).to(at::kFloat), targets); }};
}

void drop_peak(at::Device device) {
  if (device.is_cuda()) at::accelerator::resetPeakStats(device.has_index() ? device.index() : 0);
}

// Best of the rounds; backward with a gradient of the output's own kind.
Timing time_once(const OpCase& c, const std::function<at::Tensor()>& f, bool backward, at::Device device,
                 const at::Tensor& grad) {
  drop_peak(device);
  synchronize(device);
  const auto start = Clock::now();
  if (backward) {
    const at::Tensor out = f();
    torch::autograd::grad({out}, c.inputs, {grad});
  } else {
    const at::NoGradGuard no_grad;
    f();
  }
  synchronize(device);
  return {seconds_since(start), peak_memory(device).device_mib};
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  return ((x - y).norm() / y.norm().clamp_min(1e-30)).item<double>();
}

Json measure(const OpCase& c, bool backward, const OpsOptions& o, at::Device device) {
  const at::Tensor mine = c.ours(), theirs = c.plain();  // also warms up
  const at::Tensor grad = at::ones_like(mine);
  std::vector<Timing> ours, plain;
  for (int64_t i = 0; i < o.rounds; ++i) {
    ours.push_back(time_once(c, c.ours, backward, device, grad));
    plain.push_back(time_once(c, c.plain, backward, device, grad));
  }
  const auto best = [](const std::vector<Timing>& t) {
    return std::min_element(t.begin(), t.end(), [](const Timing& a, const Timing& b) { return a.best_s < b.best_s; })
        ->best_s;
  };
  const double a = best(ours), b = best(plain), flops = c.forward_flops + (backward ? c.backward_flops : 0);
  Json j{{"op", c.name},        {"backward", backward}, {"ms", 1e3 * a},
         {"plain_ms", 1e3 * b}, {"ratio", b / a},       {"difference", difference(mine, theirs)}};
  if (flops > 0) j["gflops_per_s"] = flops / a / 1e9, j["plain_gflops_per_s"] = flops / b / 1e9;
  if (device.is_cuda()) j["peak_mib"] = ours.back().device_mib, j["plain_peak_mib"] = plain.back().device_mib;
  return j;
}

void take_shapes(OpsOptions& o) {
  const model::DecoderSpec spec = model::read_spec(o.model);
  o.hidden = spec.hidden_size, o.width = spec.moe_intermediate_size, o.experts = spec.num_experts,
  o.top_k = spec.num_experts_per_tok;
  o.heads = spec.num_heads, o.kv_heads = spec.num_kv_heads, o.head_dim = spec.head_dim, o.vocab = spec.vocab_size;
}

void run(const OpsOptions& given) {
  OpsOptions o = given;
  if (!o.model.empty()) take_shapes(o);
  MOEGRAFT_CHECK_USAGE(o.top_k <= o.experts, "--top-k must be at most --experts ", o.experts, ", got ", o.top_k);
  MOEGRAFT_CHECK_USAGE(o.heads % o.kv_heads == 0, "--heads must be a multiple of --kv-heads ", o.kv_heads, ", got ",
                       o.heads);
  MOEGRAFT_CHECK_USAGE(o.head_dim % 2 == 0, "--head-dim must be even, got ", o.head_dim);
  set_threads(o.threads);
  const Shapes s{o, graft::parse_dtype(o.dtype),
                 graft::device_of(config::parse_choice<config::Device>("--device", o.device))};
  const std::vector<std::pair<std::string, OpCase (*)(const Shapes&)>> all{
      {"moe", moe_case},   {"dispatch", dispatch_case}, {"attention", attention_case}, {"linear", qkv_case},
      {"norm", norm_case}, {"residual", residual_case}, {"rotary", rotary_case},       {"loss", loss_case}};
  for (const auto& name : o.only)
    MOEGRAFT_CHECK_USAGE(std::any_of(all.begin(), all.end(), [&](const auto& c) { return c.first == name; }),
                         "--only: moe, dispatch, attention, linear, norm, residual, rotary or loss, got ", name);
  at::manual_seed(0);
  double limit = matmul_gflops(s.dtype, s.device, o.matmul);
  Json ops = Json::array();
  for (const auto& [name, make] : all) {
    if (!o.only.empty() && std::find(o.only.begin(), o.only.end(), name) == o.only.end()) continue;
    const OpCase c = make(s);
    ops.push_back(measure(c, false, o, s.device));
    if (!c.inputs.empty()) ops.push_back(measure(c, true, o, s.device));
  }
  limit = std::max(limit, matmul_gflops(s.dtype, s.device, o.matmul));
  std::vector<std::vector<std::string>> rows;
  for (auto& j : ops) {
    const bool counted = j.contains("gflops_per_s");
    if (counted) j["share_of_limit"] = j["gflops_per_s"].get<double>() / limit;
    rows.push_back({j["op"].get<std::string>() + (j["backward"].get<bool>() ? " + backward" : ""), fixed(j["ms"], 3),
                    fixed(j["plain_ms"], 3), fixed(j["ratio"], 2), counted ? fixed(j["gflops_per_s"], 0) : "",
                    counted ? fixed(j["plain_gflops_per_s"], 0) : "",
                    counted ? fixed(100 * j["share_of_limit"].get<double>(), 0) : ""});
  }
  if (o.json) {
    Json out{{"tool", "moegraft"},
             {"ops", ops},
             {"matmul_gflops", limit},
             {"dtype", o.dtype},
             {"shape",
              {{"tokens", o.tokens},
               {"seq", o.seq},
               {"hidden", o.hidden},
               {"width", o.width},
               {"experts", o.experts},
               {"top_k", o.top_k},
               {"rank", o.rank},
               {"heads", o.heads},
               {"kv_heads", o.kv_heads},
               {"head_dim", o.head_dim},
               {"vocab", o.vocab}}}};
    out.update(describe_place(s.device));
    std::cout << out.dump() << '\n';
    return;
  }
  print_table({"op", "ms", "plain ms", "times faster", "GF/s", "plain GF/s", "% of limit"}, rows);
  std::printf("a large product in %s reaches %.0f GF/s here\n", o.dtype.c_str(), limit);
}

}  // namespace

void add_ops_command(CLI::App& bench) {
  auto o = std::make_shared<OpsOptions>();
  CLI::App* cmd = bench.add_subcommand("ops", "Each fused operation beside plain LibTorch and the matmul limit");
  cmd->add_option("model", o->model, "Hugging Face directory to take the shapes from");
  const auto size = [&](const char* name, int64_t& value, const char* text) {
    cmd->add_option(name, value, text)->check(CLI::Range(1, 1 << 24))->capture_default_str();
  };
  size("--tokens", o->tokens, "Tokens");
  size("--seq", o->seq, "Tokens of a packed sequence");
  size("--hidden", o->hidden, "Model width");
  size("--width", o->width, "Expert width");
  size("--experts", o->experts, "Experts");
  size("--top-k", o->top_k, "Experts per token");
  size("--rank", o->rank, "LoRA rank");
  size("--heads", o->heads, "Query heads");
  size("--kv-heads", o->kv_heads, "Key and value heads");
  size("--head-dim", o->head_dim, "Width of a head");
  size("--vocab", o->vocab, "Vocabulary");
  size("--rounds", o->rounds, "Times each is run; the best counts");
  cmd->add_option("--matmul", o->matmul, "As for step")->check(CLI::Range(0, 1 << 16));
  cmd->add_option("--only", o->only, "Some of: moe dispatch attention linear norm residual rotary loss")
      ->delimiter(',');
  cmd->add_option("--dtype", o->dtype, "float32 or bfloat16")->capture_default_str();
  cmd->add_option("--device", o->device, "cpu or cuda")->capture_default_str();
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer("Example: moegraft bench ops --tokens 4096 --hidden 2048 --width 768 --experts 128 --top-k 8 --only moe");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools::bench
