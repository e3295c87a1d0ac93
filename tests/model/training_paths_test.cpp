// What a training step may skip or do twice must not change what it computes: frozen prefix, recomputed layers.
#include <gtest/gtest.h>

#include <filesystem>

#include "libtorch.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"

namespace moegraft::model {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(MOEGRAFT_SOURCE_DIR) / "tests/golden/model";

// Gated terms on experts and attention, and new rows.
class Terms : public AdapterSites {
 public:
  Terms(const DecoderSpec& s, std::vector<int64_t> modalities) {
    at::manual_seed(1);
    const auto leaf = [](at::IntArrayRef shape) { return (0.3 * at::randn(shape)).set_requires_grad(true); };
    gate = {leaf({s.num_experts, 3, s.hidden_size}), leaf({s.num_experts, s.moe_intermediate_size, 3}), 2.0, modalities};
    down = {leaf({s.num_experts, 3, s.moe_intermediate_size}), leaf({s.num_experts, s.hidden_size, 3}), 1.0, modalities};
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
  World(const char* name, std::vector<int64_t> modalities) : decoder(load_base(kGolden / name)), terms(std::make_shared<Terms>(decoder.spec(), std::move(modalities))) {
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
      for (size_t i = size_t(batch.cu_seqlens.back()); i < ids.size(); ++i) labels.push_back(i + 1 < ids.size() ? ids[i + 1] : kNoLabel);
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
  std::vector<at::Tensor> leaves() const { return {terms->gate.A, terms->gate.B, terms->down.A, terms->down.B, terms->v.A, terms->v.B, embedding, head}; }

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
    EXPECT_LT((a.gradients[i] - b.gradients[i]).abs().max().item<double>(), tolerance * (1 + b.gradients[i].abs().max().item<double>())) << "leaf " << i;
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
  void observe(int64_t, const at::Tensor& probs_TE, const at::Tensor&, const at::Tensor&, const at::Tensor&) override { tokens += probs_TE.size(0); }
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
      for (size_t i = 0; i < a.gradients.size(); ++i) EXPECT_TRUE(at::equal(a.gradients[i], b.gradients[i])) << "leaf " << i;
      EXPECT_EQ(stored.tokens, again.tokens);
    }
}

}  // namespace
}  // namespace moegraft::model
