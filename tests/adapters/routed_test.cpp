// What an adapter may do in an MLP beyond fixed low-rank terms: weights of tokens, a branch, a loss. The kind here is a
// test's alone: two LoRA experts and a linear branch in every MLP, whose router reads the MLP's input and has a balance
// loss over all layers' tokens together.
#include <gtest/gtest.h>

#include <filesystem>
#include <map>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/adapters/adapter.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/route.h"
#include "moegraft/model/decoder.h"

namespace moegraft::adapters {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";
constexpr int64_t kExperts = 2;

// At uniform probabilities the coefficient, 1/2.
at::Tensor balance_of(const at::Tensor& mean_E) { return 0.5 * double(kExperts) * mean_E.square().sum(); }

class Routed : public Adapter {
 public:
  struct Pair {
    std::string name;
    at::Tensor A, B;
  };
  struct Layer {
    at::Tensor router_ED, branch_DD;
  };

  explicit Routed(const AdapterContext& c) : Adapter(c) {
    const auto leaf = [](std::vector<int64_t> shape, bool per_expert, int64_t experts) {
      if (per_expert) shape.insert(shape.begin(), experts);
      return at::zeros(shape).set_requires_grad(true);
    };
    const int64_t P = c.config.rank, D = c.spec.hidden_size;
    for (const Position& p : positions()) {
      const SiteShape s = site_shape(c.spec, p.site);
      const bool per_expert = is_per_expert(c.spec, p.site);
      for (int64_t e = 0; e < kExperts; ++e)
        pairs_.push_back({name_of(p) + "." + std::to_string(e), leaf({P, s.in}, per_expert, num_experts()),
                          leaf({s.out, P}, per_expert, num_experts())});
      if (!layers_.contains(p.layer)) layers_[p.layer] = {leaf({kExperts, D}, false, 0), leaf({D, D}, false, 0)};
    }
  }

  double scale() const override { return 2.0; }
  std::vector<Parameter> parameters() const override {
    std::vector<Parameter> all;
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const Pair& p = pairs_[i];
      const int64_t layer = positions()[i / kExperts].layer;
      all.push_back({p.name + ".A", layer, p.A, p.A.dim() == 3, "kaiming"});
      all.push_back({p.name + ".B", layer, p.B, p.B.dim() == 3, "zero"});
    }
    for (const auto& [l, layer] : layers_) {
      all.push_back({"layers." + std::to_string(l) + ".router", l, layer.router_ED, false, "normal"});
      all.push_back({"layers." + std::to_string(l) + ".branch", l, layer.branch_DD, false, "zero"});
    }
    return all;
  }
  void initialise() override {
    const at::NoGradGuard no_grad;
    for (const Pair& p : pairs_) p.B.detach().zero_();
    for (const auto& [l, layer] : layers_) layer.branch_DD.detach().zero_();
  }
  void randomise(uint64_t seed) {
    const at::NoGradGuard no_grad;
    for (const Parameter& p : parameters())
      p.leaf.detach().copy_(at::randn(p.leaf.sizes(), at::make_generator<at::CPUGeneratorImpl>(seed++)).mul_(0.3));
  }

  const Layer* layer(int64_t l) const { return layers_.contains(l) ? &layers_.at(l) : nullptr; }

  model::MlpTerms mlp(const model::MlpInput& in) const override {
    model::MlpTerms out;
    const at::Tensor tokens = in.tokens_of(modalities());
    if (!layer(in.layer) || tokens.size(0) == 0) return out;
    const at::Tensor x_XD = in.x_TD.index_select(0, tokens).to(at::kFloat),
                     probs_XE = at::softmax(at::linear(x_XD, layer(in.layer)->router_ED), -1);
    for (const auto& [site, terms] : {std::pair(model::Site::gate, &out.gate), std::pair(model::Site::up, &out.up),
                                      std::pair(model::Site::down, &out.down)}) {
      *terms = at(in.layer, site);
      for (size_t e = 0; e < terms->size(); ++e)
        (*terms)[e].weight_T = in.spread(probs_XE.select(1, int64_t(e)), tokens);
    }
    out.branches.push_back({tokens, at::linear(x_XD, layer(in.layer)->branch_DD)});
    if (in.with_loss)
      out.losses.push_back({this, at::cat({probs_XE.sum(0), at::full({1}, double(tokens.size(0)), at::kFloat)})});
    return out;
  }
  at::Tensor loss(const std::vector<at::Tensor>& parts) const override {
    const at::Tensor sums = at::stack(parts).sum(0);
    return balance_of(sums.narrow(0, 0, kExperts) / sums[kExperts]);
  }

 private:
  std::vector<model::LowRank> terms(size_t position) const override {
    std::vector<model::LowRank> out;
    for (size_t e = 0; e < kExperts; ++e)
      out.push_back({pairs_[kExperts * position + e].A, pairs_[kExperts * position + e].B, scale(), modalities()});
    return out;
  }

  std::vector<Pair> pairs_;  // by position and expert
  std::map<int64_t, Layer> layers_;
};

// The same function of the same leaves, by ATen's operations under autograd: as one branch, the adapted MLP less the
// base's.
class Plainly : public model::AdapterSites {
 public:
  Plainly(std::shared_ptr<const Routed> routed, model::Decoder& decoder, std::vector<int64_t> modalities)
      : routed_(std::move(routed)), decoder_(decoder), modalities_(std::move(modalities)) {}

  std::vector<model::LowRank> at(int64_t, model::Site) const override { return {}; }
  model::MlpTerms mlp(const model::MlpInput& in) const override {
    const at::Tensor tokens = in.tokens_of(modalities_);
    const Routed::Layer* layer = routed_->layer(in.layer);
    if (!layer || tokens.size(0) == 0) return {};
    const at::Tensor x_XD = in.x_TD.index_select(0, tokens),
                     probs_XE = at::softmax(at::matmul(x_XD, layer->router_ED.t()), -1);
    const at::Tensor adapted_XD = decoder_.spec().layers[size_t(in.layer)].sparse ? experts(in.layer, x_XD, probs_XE)
                                                                                  : dense(in.layer, x_XD, probs_XE);
    model::MlpTerms out;
    out.branches.push_back({tokens, adapted_XD + at::matmul(x_XD, layer->branch_DD.t())});
    probabilities.push_back(probs_XE);
    return out;
  }
  mutable std::vector<at::Tensor> probabilities;  // of the last pass, by layer

 private:
  at::Tensor dense(int64_t l, const at::Tensor& x_XD, const at::Tensor& probs_XE) const {
    const model::DenseWeights w = decoder_.base().weights->layer(l).dense;
    const auto ffn = [&](bool adapted) {
      const auto project = [&](model::Site site, const at::Tensor& in, const kernels::Matrix& weight,
                               const at::Tensor& bias) {
        at::Tensor out = at::matmul(in, weight.tensor().t());
        if (bias.defined()) out = out + bias;
        const auto terms = routed_->at(l, site);
        for (size_t e = 0; adapted && e < terms.size(); ++e)
          out = out + probs_XE.narrow(1, int64_t(e), 1) * at::matmul(at::matmul(in, terms[e].A.t()), terms[e].B.t()) *
                          terms[e].scale;
        return out;
      };
      const at::Tensor gate = project(model::Site::gate, x_XD, w.gate_ID, w.gate_bias_I),
                       up = project(model::Site::up, x_XD, w.up_ID, w.up_bias_I);
      return project(model::Site::down, gate * at::sigmoid(gate) * up, w.down_DI, w.down_bias_D);
    };
    return ffn(true) - ffn(false);
  }

  at::Tensor experts(int64_t l, const at::Tensor& x_XD, const at::Tensor& probs_XE) const {
    const model::DecoderSpec& s = decoder_.spec();
    const kernels::RouteRule rule{s.router.score == model::RouterSpec::Score::sigmoid,
                                  {},
                                  s.router.num_groups,
                                  s.router.topk_groups,
                                  s.router.renormalise,
                                  s.router.scale};
    const kernels::Route route = kernels::route(
        at::matmul(x_XD, decoder_.base().weights->layer(l).router_ED.to(at::kFloat).t()), s.num_experts_per_tok, rule);
    const kernels::Dispatch dispatch = kernels::make_dispatch(route.topk_ids_TK, s.num_experts, {}, 1);
    const kernels::ExpertFfnWeights weights = decoder_.base().weights->experts(l, 0, s.num_experts).as_ffn();
    kernels::ExpertFfnAdapters adapters;
    for (const auto& [site, list] :
         {std::pair(model::Site::gate, &adapters.gate), std::pair(model::Site::up, &adapters.up),
          std::pair(model::Site::down, &adapters.down)}) {
      const auto terms = routed_->at(l, site);
      for (size_t e = 0; e < terms.size(); ++e)
        list->push_back({terms[e].A, terms[e].B, terms[e].scale, {true}, probs_XE.select(1, int64_t(e))});
    }
    return kernels::moe_ffn_reference(x_XD, route.topk_weights_TK, dispatch, weights, adapters) -
           kernels::moe_ffn_reference(x_XD, route.topk_weights_TK, dispatch, weights, {});
  }

  std::shared_ptr<const Routed> routed_;
  model::Decoder& decoder_;
  std::vector<int64_t> modalities_;
};

// Two sequences with a caption that is worth a pass of its own, images and text after them; every token labelled with
// its successor.
model::PackedBatch batch_of(int64_t V) {
  const auto text = [&](int64_t n) { return at::arange(n).remainder(V - 3) + 3; };
  const auto image = [&](int64_t n) { return at::arange(n).remainder(6) + V; };
  model::PackedBatch batch;
  std::vector<at::Tensor> ids, positions, labels;
  batch.cu_seqlens = {0};
  for (const at::Tensor& sequence : {at::cat({text(20), image(5), text(4), image(3)}), at::cat({image(4), text(3)})}) {
    ids.push_back(sequence);
    positions.push_back(at::arange(sequence.size(0)));
    labels.push_back(at::cat({sequence.slice(0, 1), at::full({1}, model::kNoLabel, at::kLong)}));
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + sequence.size(0));
  }
  batch.ids_T = at::cat(ids), batch.positions_T = at::cat(positions), batch.labels_T = at::cat(labels);
  batch.modality_T = batch.ids_T.ge(V).to(at::kLong);
  return batch;
}

AdapterConfig config_of(std::vector<std::string> sites = {"gate", "up", "down"}) {
  AdapterConfig c;
  c.rank = 3;
  c.sites = std::move(sites);
  return c;
}

struct World {
  explicit World(const char* base)
      : decoder(model::load_base(kGolden / base)), batch(batch_of(decoder.spec().vocab_size)) {
    const auto rows = [&](uint64_t seed) {
      return at::randn({6, decoder.spec().hidden_size}, at::make_generator<at::CPUGeneratorImpl>(seed));
    };
    decoder.attach_rows({1, decoder.spec().vocab_size, rows(4), rows(5)});
    adapter = make(0);
  }
  std::shared_ptr<Routed> make(int64_t index) const {
    const AdapterConfig config = config_of();
    auto made = std::make_shared<Routed>(AdapterContext{decoder.spec(), config, index, {1}});
    made->randomise(uint64_t(100 * index + 1));
    return made;
  }

  model::Decoder decoder;
  model::PackedBatch batch;
  std::shared_ptr<Routed> adapter;
};

struct Outcome {
  at::Tensor hidden;
  double objective = 0, balance = 0;
  std::vector<at::Tensor> gradients;
  bool split = false;
};
// plainly: whose probabilities make the balance loss, instead of the adapter's own.
Outcome step(World& w, model::ForwardOptions options, const Plainly* plainly = nullptr) {
  const auto parameters = w.adapter->parameters();
  for (const auto& p : parameters) p.leaf.mutable_grad() = at::Tensor();
  options.adapter_loss = true;
  const model::ForwardResult forward = w.decoder.forward(w.batch, options);
  const at::Tensor balance = plainly ? balance_of(at::cat(plainly->probabilities).mean(0)) : forward.adapter_loss;
  const at::Tensor objective = model::cross_entropy_loss(w.decoder, forward, w.batch).loss + balance;
  objective.backward();
  Outcome out{forward.hidden_TD.detach(),
              objective.item<double>(),
              balance.item<double>(),
              {},
              forward.rest_hidden_TD.defined()};
  for (const auto& p : parameters)
    out.gradients.push_back(p.leaf.grad().defined() ? p.leaf.grad().clone() : at::zeros_like(p.leaf));
  return out;
}

// Relative to each gradient's norm.
void expect_near(const World& w, const Outcome& got, const Outcome& want, double tolerance) {
  EXPECT_NEAR(got.objective, want.objective, tolerance * (1 + std::abs(want.objective)));
  EXPECT_NEAR(got.balance, want.balance, tolerance);
  EXPECT_LT((got.hidden - want.hidden).abs().max().item<double>(),
            tolerance * (1 + want.hidden.abs().max().item<double>()));
  const auto parameters = w.adapter->parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_GT(want.gradients[i].norm().item<double>(), 0) << parameters[i].name;
    EXPECT_LT((got.gradients[i] - want.gradients[i]).norm().item<double>(),
              tolerance * want.gradients[i].norm().item<double>())
        << parameters[i].name;
  }
}

class RoutedOn : public ::testing::TestWithParam<const char*> {};

TEST_P(RoutedOn, ValuesAndGradientsAreThoseOfAutograd) {
  World w(GetParam());
  for (const model::Gate gate : {model::Gate::modality, model::Gate::all}) {
    model::ForwardOptions options;
    options.gate = gate;
    w.decoder.attach(w.adapter);
    const Outcome got = step(w, options);
    EXPECT_EQ(got.split, gate == model::Gate::modality);
    options.frozen_prefix = false;
    const auto plainly = std::make_shared<Plainly>(w.adapter, w.decoder, std::vector<int64_t>{1});
    w.decoder.attach(plainly);
    expect_near(w, got, step(w, options, plainly.get()), 1e-4);
  }
}

TEST_P(RoutedOn, RecomputedLayersGiveTheSame) {
  World w(GetParam());
  w.decoder.attach(w.adapter);
  model::ForwardOptions options;
  const Outcome stored = step(w, options);
  for (const int64_t layers : {1, 100}) {
    options.recompute_layers = layers;
    const Outcome recomputed = step(w, options);
    EXPECT_EQ(recomputed.objective, stored.objective);
    EXPECT_EQ(recomputed.balance, stored.balance);
    expect_near(w, recomputed, stored, 1e-5);  // the order in which gradients of one leaf are added may differ
  }
}

TEST_P(RoutedOn, TextKeepsItsBitsAndStepZeroIsTheBase) {
  const at::NoGradGuard no_grad;
  World w(GetParam());
  const model::PackedBatch text = model::pack_rows(at::arange(3, 27).view({1, -1}));
  model::ForwardOptions closed;
  closed.gate = model::Gate::none;
  const at::Tensor base_text = w.decoder.forward(text).hidden_TD, base_mixed = w.decoder.forward(w.batch).hidden_TD,
                   base_closed = w.decoder.forward(w.batch, closed).hidden_TD;
  w.decoder.attach(w.adapter);
  const at::Tensor mixed = w.decoder.forward(w.batch).hidden_TD;
  EXPECT_TRUE(at::equal(w.decoder.forward(text).hidden_TD, base_text));
  EXPECT_TRUE(at::equal(mixed.narrow(0, 0, 20), base_mixed.narrow(0, 0, 20)));  // the caption, which sees no image
  EXPECT_GT((mixed - base_mixed).abs().max().item<double>(), 1e-2);
  EXPECT_TRUE(at::equal(w.decoder.forward(w.batch, closed).hidden_TD, base_closed));
  w.adapter->initialise();
  EXPECT_TRUE(at::equal(w.decoder.forward(w.batch).hidden_TD, base_mixed));
}

INSTANTIATE_TEST_SUITE_P(Bases, RoutedOn,
                         ::testing::Values("llama_bias_tied", "qwen3_dense", "qwen3", "mixtral", "qwen2_moe",
                                           "qwen3_mixed"),
                         [](const auto& info) { return std::string(info.param); });

// On a dense base, where no nudge flips an expert: along each gradient, whose norm is the slope.
TEST(Routed, GradientsAreThoseOfFiniteDifferences) {
  World w("llama_bias_tied");
  w.decoder.attach(w.adapter);
  const Outcome at_rest = step(w, {});
  const at::NoGradGuard no_grad;
  model::ForwardOptions options;
  options.adapter_loss = true;
  const auto objective = [&] {
    const model::ForwardResult forward = w.decoder.forward(w.batch, options);
    return model::cross_entropy_loss(w.decoder, forward, w.batch).loss.item<double>() +
           forward.adapter_loss.item<double>();
  };
  const auto parameters = w.adapter->parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor leaf = parameters[i].leaf.detach(), before = leaf.clone();
    const double slope = at_rest.gradients[i].norm().item<double>(), h = 1e-2;
    const at::Tensor direction = at_rest.gradients[i] / slope;
    leaf.copy_(before + h * direction);
    const double up = objective();
    leaf.copy_(before - h * direction);
    const double down = objective();
    leaf.copy_(before);
    EXPECT_NEAR((up - down) / (2 * h), slope, 2e-2 * slope + 2e-4)
        << parameters[i].name;  // float32: 1e-6 of the losses over 2 h; the third derivative's h^2
  }
}

TEST(Routed, AStackHoldsItBesideOthers) {
  World w("qwen3");
  w.decoder.attach(w.adapter);
  const Outcome alone = step(w, {});
  auto stack = std::make_shared<AdapterStack>();
  const AdapterConfig lora = config_of({"q", "gate", "down"});
  stack->add(make_adapter({w.decoder.spec(), lora, 1, {1}}));  // zeros: adds nothing
  stack->add(w.adapter);
  w.decoder.attach(stack);
  expect_near(w, step(w, {}), alone, 1e-5);
}

TEST(Routed, LossesOfAStackAddUp) {
  const at::NoGradGuard no_grad;
  World w("qwen3");
  const auto other = w.make(1);
  for (const auto& adapter : {w.adapter, other}) adapter->initialise();  // neither changes what the other sees
  model::ForwardOptions options;
  options.adapter_loss = true;
  const auto loss = [&](std::shared_ptr<const model::AdapterSites> adapters) {
    w.decoder.attach(std::move(adapters));
    return w.decoder.forward(w.batch, options).adapter_loss.item<double>();
  };
  auto stack = std::make_shared<AdapterStack>();
  stack->add(w.adapter), stack->add(other);
  const double first = loss(w.adapter), second = loss(other);
  EXPECT_NE(first, second);
  EXPECT_NEAR(loss(stack), first + second, 1e-6);
}

TEST(Routed, ThereIsNoLossWithoutAskingOrWithoutTokens) {
  World w("qwen3");
  EXPECT_FALSE(w.decoder.forward(w.batch).adapter_loss.defined());
  w.decoder.attach(w.adapter);
  EXPECT_FALSE(w.decoder.forward(w.batch).adapter_loss.defined());
  model::ForwardOptions options;
  options.adapter_loss = true;
  EXPECT_FALSE(w.decoder.forward(model::pack_rows(at::arange(3, 27).view({1, -1})), options).adapter_loss.defined());
  EXPECT_TRUE(w.decoder.forward(w.batch, options).adapter_loss.defined());
}

// Acts through a branch alone; its loss is its factor, of every layer.
class Branch : public model::AdapterSites {
 public:
  explicit Branch(bool text) : text_(text) {}
  std::vector<model::LowRank> at(int64_t, model::Site) const override { return {}; }
  model::MlpTerms mlp(const model::MlpInput& in) const override {
    const at::Tensor tokens = in.tokens_of(text_ ? std::vector<int64_t>{0, 1} : std::vector<int64_t>{1});
    model::MlpTerms out;
    if (tokens.size(0) > 0) out.branches.push_back({tokens, in.x_TD.index_select(0, tokens) * factor});
    if (in.with_loss) out.losses.push_back({this, factor.sum()});
    return out;
  }
  bool mlp_takes_text() const override { return text_; }
  at::Tensor factor = at::ones({1}).set_requires_grad(true);

 private:
  bool text_;
};

TEST(Routed, ABranchOnTextThawsThePrefix) {
  World w("llama_bias_tied");
  w.decoder.attach(std::make_shared<Branch>(false));
  EXPECT_TRUE(w.decoder.forward(w.batch).rest_hidden_TD.defined());
  w.decoder.attach(std::make_shared<Branch>(true));
  EXPECT_FALSE(w.decoder.forward(w.batch).rest_hidden_TD.defined());
}

TEST(Routed, LossesOfLayersAddUpEachOnce) {
  World w("llama_bias_tied");
  const auto branch = std::make_shared<Branch>(false);
  w.decoder.attach(branch);
  model::ForwardOptions options;
  options.adapter_loss = true;
  const double layers = double(w.decoder.spec().num_layers);
  for (const int64_t recomputed : {0, 1, 100}) {
    options.recompute_layers = recomputed;
    branch->factor.mutable_grad() = at::Tensor();
    const at::Tensor loss = w.decoder.forward(w.batch, options).adapter_loss;
    EXPECT_EQ(loss.item<double>(), layers);
    loss.backward();
    EXPECT_EQ(branch->factor.grad().item<double>(), layers) << recomputed << " layers recomputed";
  }
}

// As under expert parallelism: rows of other processes.
class Elsewhere : public model::LocalDispatcher {
 public:
  Routed dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK, const at::Tensor& topk_weights_TK,
                  int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) override {
    Routed routed = LocalDispatcher::dispatch(x_TD, topk_ids_TK, topk_weights_TK, num_experts, group_T, num_groups);
    routed.plan = std::make_shared<int>(0);
    return routed;
  }
};

TEST(Routed, IsRefusedUnderExpertParallelism) {
  World w("qwen3");
  w.decoder.set_dispatcher(std::make_shared<Elsewhere>());
  w.decoder.attach(w.adapter);
  try {
    w.decoder.forward(w.batch);
    FAIL() << "went through";
  } catch (const InvariantError& e) {
    EXPECT_NE(std::string(e.what()).find("expert parallelism"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace moegraft::adapters
