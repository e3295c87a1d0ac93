// What a training step may skip or do twice, and where its weights come from, must not change what it computes: frozen
// prefix, recomputed layers, offload.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"
#include "moegraft/model/offload.h"

namespace moegraft::model {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";

// Gated terms on experts and attention, and new rows.
class Terms : public AdapterSites {
 public:
  Terms(const DecoderSpec& s, std::vector<int64_t> modalities) {
    at::manual_seed(1);
    const auto leaf = [](at::IntArrayRef shape) { return (0.3 * at::randn(shape)).set_requires_grad(true); };
    gate = {leaf({s.num_experts, 3, s.hidden_size}), leaf({s.num_experts, s.moe_intermediate_size, 3}), 2.0,
            modalities};
    down = {leaf({s.num_experts, 3, s.moe_intermediate_size}), leaf({s.num_experts, s.hidden_size, 3}), 1.0,
            modalities};
    v = {leaf({3, s.hidden_size}), leaf({s.num_kv_heads * s.head_dim, 3}), 2.0, modalities};
  }
  std::vector<LowRank> at(int64_t, Site site) const override {
    if (site == Site::gate) return {gate};
    if (site == Site::down) return {down};
    if (site == Site::v) return {v};
    return {};
  }
  LowRank gate, down, v;
};

struct World {
  World(const char* name, std::vector<int64_t> modalities) : World(load_base(kGolden / name), std::move(modalities)) {}
  World(BaseModel base, std::vector<int64_t> modalities)
      : decoder(std::move(base)), terms(std::make_shared<Terms>(decoder.spec(), std::move(modalities))) {
    const DecoderSpec& s = decoder.spec();
    const auto leaf = [&](int64_t rows) { return (0.3 * at::randn({rows, s.hidden_size})).set_requires_grad(true); };
    embedding = leaf(6);
    head = s.tie_word_embeddings ? embedding : leaf(6);
    decoder.attach(terms);
    decoder.attach_rows({1, s.vocab_size, embedding, head});
    // Captions of 9, 0, 14 and 30 tokens before 6, 8, 5 and 0 of the other modality; the third goes on in text.
    const int64_t V = s.vocab_size;
    std::vector<int64_t> ids, modality, positions, labels;
    const auto sequence = [&](int64_t before, int64_t image, int64_t after) {
      for (int64_t i = 0; i < before + image + after; ++i) {
        const bool is_image = i >= before && i < before + image;
        ids.push_back(is_image ? V + (i * 5) % 6 : 3 + (i * 7 + before) % (V - 3));
        modality.push_back(is_image);
        positions.push_back(i);
      }
      for (size_t i = size_t(batch.cu_seqlens.back()); i < ids.size(); ++i)
        labels.push_back(i + 1 < ids.size() ? ids[i + 1] : kNoLabel);
      labels.back() = kNoLabel;
      batch.cu_seqlens.push_back(int64_t(ids.size()));
    };
    batch.cu_seqlens = {0};
    sequence(9, 6, 0);
    sequence(0, 8, 0);
    sequence(14, 5, 7);
    sequence(30, 0, 0);
    batch.ids_T = at::tensor(ids);
    batch.modality_T = at::tensor(modality);
    batch.positions_T = at::tensor(positions);
    batch.labels_T = at::tensor(labels);
  }
  std::vector<at::Tensor> leaves() const {
    return {terms->gate.A, terms->gate.B, terms->down.A, terms->down.B, terms->v.A, terms->v.B, embedding, head};
  }

  Decoder decoder;
  std::shared_ptr<Terms> terms;
  at::Tensor embedding, head;
  PackedBatch batch;
};

struct Outcome {
  at::Tensor hidden;
  double loss = 0;
  std::vector<at::Tensor> gradients;
  bool split = false;
};

Outcome step(World& w, const ForwardOptions& options) {
  for (auto& leaf : w.leaves()) leaf.mutable_grad() = at::Tensor();
  const ForwardResult forward = w.decoder.forward(w.batch, options);
  const LossResult loss = cross_entropy_loss(w.decoder, forward, w.batch);
  loss.loss.backward();
  Outcome out{forward.hidden_TD.detach(), loss.loss.item<double>(), {}, forward.rest_hidden_TD.defined()};
  for (const auto& leaf : w.leaves()) out.gradients.push_back(leaf.grad().clone());
  return out;
}

void expect_equal(const Outcome& a, const Outcome& b, double tolerance) {
  EXPECT_LT((a.hidden - b.hidden).abs().max().item<double>(), tolerance * (1 + b.hidden.abs().max().item<double>()));
  EXPECT_NEAR(a.loss, b.loss, tolerance * (1 + std::abs(b.loss)));
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    EXPECT_GT(b.gradients[i].abs().max().item<double>(), 0) << "leaf " << i;
    EXPECT_LT((a.gradients[i] - b.gradients[i]).abs().max().item<double>(),
              tolerance * (1 + b.gradients[i].abs().max().item<double>()))
        << "leaf " << i;
  }
}

const char* const kModels[] = {"olmoe", "qwen3_mixed", "mixtral_window", "mixtral_llama3", "olmoe_clip_norm_tied"};

TEST(FrozenPrefix, GivesTheGradientsOfThePlainPath) {
  for (const char* name : kModels) {
    SCOPED_TRACE(name);
    World w(name, {1});
    ForwardOptions plain;
    plain.frozen_prefix = false;
    const Outcome whole = step(w, plain), split = step(w, {});
    EXPECT_FALSE(whole.split);
    ASSERT_TRUE(split.split);
    expect_equal(split, whole, 1e-5);
  }
}

TEST(FrozenPrefix, IsOffWhenSomethingTrainsOnText) {
  World w("olmoe", {0, 1});
  EXPECT_FALSE(step(w, {}).split);
  World image("olmoe", {1});
  ForwardOptions open;
  open.gate = Gate::all;
  EXPECT_FALSE(step(image, open).split);
  at::NoGradGuard no_grad;
  EXPECT_FALSE(image.decoder.forward(image.batch).rest_hidden_TD.defined());
}

TEST(FrozenPrefix, TextAloneRecordsNothing) {
  World w("olmoe", {1});
  w.batch = pack_rows(at::arange(3, 43).view({2, 20}));
  w.batch.modality_T = at::zeros({40}, at::kLong);
  w.batch.labels_T = w.batch.ids_T.roll(-1);
  const ForwardResult forward = w.decoder.forward(w.batch);
  EXPECT_FALSE(forward.hidden_TD.requires_grad());
  ForwardOptions plain;
  plain.frozen_prefix = false;
  EXPECT_TRUE(at::equal(forward.hidden_TD, w.decoder.forward(w.batch, plain).hidden_TD));
}

// Counts what it is told.
class Counter : public RoutingObserver {
 public:
  void observe(int64_t, const at::Tensor& probs_TE, const at::Tensor&, const at::Tensor&, const at::Tensor&) override {
    tokens += probs_TE.size(0);
  }
  int64_t tokens = 0;
};

TEST(Recompute, GivesTheBitsOfTheStoredPath) {
  for (const char* name : kModels)
    for (const int64_t layers : {1, 100}) {
      SCOPED_TRACE(name);
      World w(name, {1});
      Counter stored, again;
      ForwardOptions plain, recomputed;
      plain.routing = &stored;
      recomputed.routing = &again;
      recomputed.recompute_layers = layers;
      const Outcome a = step(w, recomputed), b = step(w, plain);
      EXPECT_EQ(a.loss, b.loss);
      for (size_t i = 0; i < a.gradients.size(); ++i)
        EXPECT_TRUE(at::equal(a.gradients[i], b.gradients[i])) << "leaf " << i;
      EXPECT_EQ(stored.tokens, again.tokens);
    }
}

// Sums of all it is told.
class Listener : public RoutingObserver {
 public:
  void observe(int64_t layer, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK,
               const at::Tensor& topk_weights_TK, const at::Tensor& modality_T) override {
    const at::Tensor text =
        modality_T.defined() ? (modality_T == 0).nonzero().squeeze(1) : at::arange(probs_TE.size(0));
    tokens += text.size(0);
    const at::Tensor sums =
        at::cat({probs_TE.index_select(0, text).to(at::kDouble).sum(0),
                 at::bincount(topk_ids_TK.index_select(0, text).reshape({-1}), {}, probs_TE.size(1)).to(at::kDouble),
                 topk_weights_TK.index_select(0, text).to(at::kDouble).sum(0)});
    if (sums_of.size() <= size_t(layer)) sums_of.resize(size_t(layer) + 1);
    sums_of[size_t(layer)] = sums_of[size_t(layer)].defined() ? sums_of[size_t(layer)] + sums : sums;
  }
  int64_t tokens = 0;
  std::vector<at::Tensor> sums_of;
};

void expect_same_bits(const Outcome& a, const Outcome& b) {
  EXPECT_TRUE(at::equal(a.hidden, b.hidden));
  EXPECT_EQ(a.loss, b.loss);
  for (size_t i = 0; i < a.gradients.size(); ++i)
    EXPECT_TRUE(at::equal(a.gradients[i], b.gradients[i])) << "leaf " << i;
}

// Captions of the world, without the empty one and the one that nothing follows.
constexpr int64_t kCaptionTokens = 9 + 14;

TEST(PrefixCache, FoundOrNewItGivesTheGradientsOfThePlainPath) {
  for (const char* name : kModels) {
    SCOPED_TRACE(name);
    World w(name, {1});  // every token is labelled, captions too
    PrefixCache cache(1 << 20);
    ForwardOptions plain, cached;
    plain.frozen_prefix = false;
    cached.prefix_cache = &cache;
    Listener told_plain, told_cold, told_warm;
    plain.routing = &told_plain;
    const Outcome whole = step(w, plain);
    cached.routing = &told_cold;
    const Outcome cold = step(w, cached);
    EXPECT_EQ(cache.take_use().found, 0);
    cached.routing = &told_warm;
    const Outcome warm = step(w, cached);
    const PrefixCache::Use use = cache.take_use();
    EXPECT_EQ(use.tokens, kCaptionTokens);
    EXPECT_EQ(use.found, kCaptionTokens);
    EXPECT_EQ(cache.size(), 2);  // text alone is not kept
    ASSERT_TRUE(cold.split && warm.split);
    expect_equal(cold, whole, 1e-5);
    expect_same_bits(warm, cold);
    EXPECT_EQ(told_warm.tokens, told_plain.tokens);
    for (size_t l = 0; l < told_plain.sums_of.size(); ++l) {
      if (!told_plain.sums_of[l].defined()) continue;
      EXPECT_TRUE(at::equal(told_warm.sums_of[l], told_cold.sums_of[l])) << l;
      EXPECT_TRUE(at::allclose(told_warm.sums_of[l], told_plain.sums_of[l], 1e-5, 1e-5)) << l;
    }
  }
}

TEST(PrefixCache, KeepsWhatFitsAndTheBitsDoNotShowIt) {
  World w("olmoe", {1});
  PrefixCache large(1 << 20), none(0);
  ForwardOptions options;
  options.prefix_cache = &large;
  const Outcome all = step(w, options);
  const int64_t one = large.bytes() - 1;  // the second does not fit
  PrefixCache small(one);
  for (PrefixCache* cache : {&small, &small, &none, &none}) {
    options.prefix_cache = cache;
    expect_same_bits(step(w, options), all);
  }
  EXPECT_EQ(small.size(), 1);
  EXPECT_LE(small.bytes(), one);
  EXPECT_EQ(none.size(), 0);
  EXPECT_EQ(large.find({1, 2, 3}), nullptr);
}

// A batch of captions of all sorts of lengths, each before two tokens of the other modality.
PackedBatch captions_of(const World& w, const std::vector<int64_t>& lengths) {
  const int64_t V = w.decoder.spec().vocab_size;
  std::vector<int64_t> ids, modality, positions;
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i < length + 2; ++i)
      ids.push_back(i < length ? 3 + (i * 7 + length * length) % (V - 3) : V + i % 6), modality.push_back(i >= length),
          positions.push_back(i);
    batch.cu_seqlens.push_back(int64_t(ids.size()));
  }
  batch.ids_T = at::tensor(ids), batch.modality_T = at::tensor(modality), batch.positions_T = at::tensor(positions);
  return batch;
}

void expect_bits_as_alone(BaseModel base) {
  const std::vector<int64_t> lengths{16, 17, 31, 33, 64, 100, 127, 129, 200, 300};
  World w(std::move(base), {1});
  const auto fill = [&](PrefixCache& cache, const std::vector<int64_t>& which) {
    ForwardOptions options;
    options.prefix_cache = &cache;
    w.decoder.forward(captions_of(w, which), options);
  };
  PrefixCache together(1 << 28);
  fill(together, lengths);
  ASSERT_EQ(together.size(), int64_t(lengths.size()));
  const DecoderSpec& spec = w.decoder.spec();
  const bool sparse = std::all_of(spec.layers.begin(), spec.layers.end(), [](const auto& l) { return l.sparse; });
  // One by one where a layer is dense; else as the machine can.
  EXPECT_EQ(together.may_share_a_pass(spec, *w.decoder.base().weights),
            sparse && w.decoder.base().weights->head_VD().packed() != nullptr);
  for (const int64_t length : lengths) {
    PrefixCache alone(1 << 28);
    fill(alone, {length});
    const PackedBatch batch = captions_of(w, {length});
    const PrefixCache::Ids ids(batch.ids_T.const_data_ptr<int64_t>(), batch.ids_T.const_data_ptr<int64_t>() + length);
    const auto a = together.find(ids), b = alone.find(ids);
    ASSERT_TRUE(a && b) << length;
    EXPECT_TRUE(at::equal(a->keys_LSGC, b->keys_LSGC) && at::equal(a->values_LSGC, b->values_LSGC) &&
                at::equal(a->hidden_SD, b->hidden_SD))
        << length;
    EXPECT_TRUE(at::equal(a->probs_NSE, b->probs_NSE) && at::equal(a->ids_NSK, b->ids_NSK) &&
                at::equal(a->weights_NSK, b->weights_NSK))
        << length;
  }
}

TEST(PrefixCache, ACaptionHasTheBitsThatItHasAlone) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16})
    for (const char* name : {"olmoe", "qwen3_mixed", "mixtral_window", "mixtral_llama3"}) {
      SCOPED_TRACE(std::string(name) + " " + c10::toString(dtype));
      expect_bits_as_alone(load_base(kGolden / name, {dtype}));
    }
}

// Wide enough that libraries choose their kernels by the number of rows.
TEST(PrefixCache, ACaptionOfAWideModelHasTheBitsThatItHasAlone) {
  const auto dir = std::filesystem::temp_directory_path() / ("moegraft_captions_" + std::to_string(::getpid()));
  DecoderSpec spec = read_spec(kGolden / "mixtral_llama3");
  spec.hidden_size = 520, spec.num_experts = 24, spec.num_experts_per_tok = 4, spec.moe_intermediate_size = 72;
  save_base(init_base(spec, {1.0, 3}), dir, at::kFloat);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) expect_bits_as_alone(load_base(dir, {dtype}));
  std::filesystem::remove_all(dir);
}

TEST(PrefixCache, IsLeftAloneWhereThePrefixIsNotFrozenOrOthersWait) {
  PrefixCache cache(1 << 20);
  ForwardOptions options;
  options.prefix_cache = &cache;
  World text("olmoe", {0, 1}), image("olmoe", {1});
  step(text, options);
  ForwardOptions open = options, lockstep = options;
  open.gate = Gate::all;
  step(image, open);
  lockstep.lockstep = true;
  step(image, lockstep);
  EXPECT_EQ(cache.take_use().tokens, 0);
  EXPECT_EQ(cache.size(), 0);
}

// Resident experts without panels: what offloaded ones compute with on the CPU.
class WithoutExpertPanels : public WeightProvider {
 public:
  explicit WithoutExpertPanels(std::shared_ptr<WeightProvider> inner) : inner_(std::move(inner)) {}
  kernels::Matrix embedding_VD() override { return inner_->embedding_VD(); }
  kernels::Matrix head_VD() override { return inner_->head_VD(); }
  at::Tensor final_norm_D() override { return inner_->final_norm_D(); }
  LayerWeights layer(int64_t index) override { return inner_->layer(index); }
  ExpertWeights experts(int64_t layer, int64_t first, int64_t count) override {
    ExpertWeights w = inner_->experts(layer, first, count);
    w.panels = nullptr;
    return w;
  }
  at::ScalarType dtype() const override { return inner_->dtype(); }
  at::Device device() const override { return inner_->device(); }

 private:
  std::shared_ptr<WeightProvider> inner_;
};

BaseModel resident(const std::filesystem::path& dir) {
  BaseModel base = load_base(dir);
  base.weights = std::make_shared<WithoutExpertPanels>(base.weights);
  return base;
}
BaseModel offloaded(const std::filesystem::path& dir) {
  return load_base(dir, {at::kFloat, at::kCPU, Experts::offloaded});
}
// As a GPU's are: copied into chunks, small ones here, so that layers and their matrices are cut.
BaseModel in_chunks(const std::filesystem::path& dir) {
  LoadOptions options;
  options.keep_experts = [](std::shared_ptr<WeightProvider> rest) {
    return std::make_shared<OffloadedWeights>(
        std::move(rest), HostArena([](int64_t bytes) { return at::empty({bytes}, at::kByte); }, 4096));
  };
  return load_base(dir, options);
}
using Load = BaseModel (*)(const std::filesystem::path&);

// More layers than the ring has buffers.
class Offload : public ::testing::TestWithParam<Load> {
 protected:
  Offload() : deep_(std::filesystem::temp_directory_path() / ("moegraft_offload_" + std::to_string(::getpid()))) {
    DecoderSpec spec = read_spec(kGolden / "mixtral_llama3");
    spec.num_layers = 5;
    spec.layers.assign(5, spec.layers.front());
    save_base(init_base(spec, {1.0, 3}), deep_, at::kFloat);
  }
  ~Offload() override { std::filesystem::remove_all(deep_); }
  std::filesystem::path deep_;
};
INSTANTIATE_TEST_SUITE_P(From, Offload, ::testing::Values(offloaded, in_chunks),
                         [](const auto& info) { return info.index == 0 ? "mapped_files" : "chunks"; });
const OffloadedWeights::Traffic& traffic(const BaseModel& base) {
  return dynamic_cast<const OffloadedWeights&>(*base.weights).traffic();
}

TEST_P(Offload, TheRingHoldsTheRightWeightsForwardAndBackward) {
  BaseModel base = GetParam()(deep_), plain = resident(deep_);
  const int64_t L = base.spec.num_layers, E = base.spec.num_experts;
  const auto visit = [&](int64_t l, int64_t next) {
    base.weights->prefetch(next);
    const ExpertWeights got = base.weights->experts(l, 0, E), want = plain.weights->experts(l, 0, E);
    for (int64_t e = 0; e < E; ++e) {
      EXPECT_TRUE(at::equal(got.gate_FD[e], want.gate_FD[e])) << "layer " << l << " expert " << e;
      EXPECT_TRUE(at::equal(got.up_FD[e], want.up_FD[e])) << "layer " << l << " expert " << e;
      EXPECT_TRUE(at::equal(got.down_DF[e], want.down_DF[e])) << "layer " << l << " expert " << e;
    }
    const ExpertWeights part = base.weights->experts(l, 1, 2);
    EXPECT_EQ(part.first, 1);
    EXPECT_TRUE(at::equal(part.down_DF[1], want.down_DF[2]));
  };
  for (int round = 0; round < 3; ++round) {
    for (int64_t l = 0; l < L; ++l) visit(l, l + 1);
    for (int64_t l = L - 1; l >= 0; --l) visit(l, l - 1);
  }
  EXPECT_EQ(traffic(base).late, 1);  // the very first layer
  EXPECT_EQ(traffic(base).replaced, 0);
}

TEST_P(Offload, WhatSomebodyHoldsIsNeverOverwritten) {
  BaseModel base = GetParam()(deep_);
  const int64_t L = base.spec.num_layers, E = base.spec.num_experts;
  std::vector<ExpertWeights> held;
  for (int64_t l = 0; l < L; ++l) held.push_back(base.weights->experts(l, 0, E));
  for (int64_t l = 0; l < L; ++l)
    EXPECT_TRUE(at::equal(held[l].down_DF[0], resident(deep_).weights->experts(l, 0, E).down_DF[0])) << l;
  EXPECT_EQ(traffic(base).replaced, L - 2);
}

TEST_P(Offload, GivesTheBitsOfResidentWeights) {
  for (const auto& dir : {deep_, kGolden / "olmoe", kGolden / "qwen3_mixed"})
    for (const bool gated : {true, false}) {
      SCOPED_TRACE(dir.string());
      World there(resident(dir), {1}), visiting(GetParam()(dir), {1});
      ForwardOptions options;
      options.frozen_prefix = gated;
      options.gate = gated ? Gate::modality : Gate::all;
      for (int round = 0; round < 2; ++round) {
        const Outcome a = step(visiting, options), b = step(there, options);
        EXPECT_EQ(a.split, b.split);
        EXPECT_EQ(a.loss, b.loss);
        EXPECT_TRUE(at::equal(a.hidden, b.hidden));
        for (size_t i = 0; i < a.gradients.size(); ++i)
          EXPECT_TRUE(at::equal(a.gradients[i], b.gradients[i])) << "leaf " << i;
      }
      EXPECT_EQ(traffic(visiting.decoder.base()).replaced, 0);
      if (dir == deep_) EXPECT_EQ(traffic(visiting.decoder.base()).late, 1) << "only the very first layer";
    }
}

}  // namespace
}  // namespace moegraft::model
